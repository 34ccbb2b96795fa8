"""Packed models against the ones that were trained."""

import re
import shutil
import zlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from configs import common
from configs import pquant
from pallas_kernels import dispatch
from pallas_kernels import native
from qat import manifest
from qat.infer import load
from qat.infer import pack
from qat.interop import folder
from qat.nn import stacked
from qat.nn import transformer
from qat.quant import packed
from qat.quant import packed_dot
from tests import tiny

CPU = dispatch.Target('cpu')
# In one model: a linear with each of these, of the rest by config.
SPECS = {
  'attn/q': ('lsq3', 'int8', 'channel'),
  'attn/k': ('int2', 'int8', 'tensor'),
  'attn/v': ('int4_asym', 'int8', 'channel'),
  'attn/o': ('binary_mix', 'int8', 'tensor'),
  'ffn/gate': ('lwc4', 'int8', 'channel'),
  'ffn/up': ('fp8', 'int4', 'tensor'),
  'ffn/down': ('paretoq_ternary', 'int8_asym', 'channel'),
  'more/attn/q': ('int8', 'int8', 'group'),
  'more/attn/k': ('lwc2', 'int8', 'group'),
  'more/attn/v': ('int3', 'int6', 'channel'),
  'more/attn/o': ('paretoq1', 'none', 'tensor'),
  'more/ffn/gate': ('lwc8', 'none', 'channel'),
  'more/ffn/up': ('lwc6', 'int8', 'channel'),
  'more/ffn/down': ('int8', 'int8', 'tensor'),
}
# Without a packed form.
KEPT = ('attn/o', 'ffn/up', 'more/attn/q', 'more/attn/k')


def config(method, fields=None):
  made = tiny.config(
    'bitnet' if method == 'mixed' else method, {**tiny.EXACT, **(fields or {})}
  )
  if method != 'mixed':
    return made
  made = made.copy_and_resolve_references().unlock()
  made.model.n_layers = 2
  made.quant.specs = {
    name.replace('/', '_'): common.spec(*spec, group_size=8, kept_share=0.1)
    for name, spec in SPECS.items()
  }
  made.quant.rules = tuple(
    (
      re.sub('^more', 'block_1', n) if 'more' in n else f'block_0/{n}',
      n.replace('/', '_'),
    )
    for n in SPECS
  )
  return made.lock()


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def trained(config):
  model = transformer.build(config, 'cpu', 1)
  tokens = jnp.zeros((1, 8), jnp.int32)
  params = jax.jit(lambda key: model.init(key, tokens)['params'])(
    jax.random.key(0)
  )
  return model, params


def moved(params):
  """Learned vectors that are not at their start, where some are alike."""

  def one(keys, leaf):
    if leaf.ndim == 0 or keys[-1].key == 'kernel':
      return leaf
    seed = zlib.crc32(jax.tree_util.keystr(keys).encode())
    noise = np.random.default_rng(seed).uniform(0.8, 1.25, leaf.shape)
    return leaf * noise.astype(np.float32)

  return jax.tree_util.tree_map_with_path(one, params)


def packed_params(model, params, **options):
  made = pack.leaves(model, params, CPU, **options)
  return folder.nested(dict(made))


TOKENS = np.random.default_rng(0).integers(0, 64, (2, 6)).astype(np.int32)


def logits(model, params):
  run = jax.jit(
    lambda p: model.apply({'params': p}, TOKENS, method='logits')[0]
  )
  return np.asarray(run(params))


@pytest.mark.parametrize(
  'method',
  ['bitnet', 'pquant8', 'mixed']  # Which has a layer of each format.
  + [
    pytest.param(method, marks=pytest.mark.slow)
    for method in ('fp', 'b158', 'pquant', 'onebit', 'lsq', 'paretoq')
  ]
  + [pytest.param('integer', marks=pytest.mark.slow)],
)
def test_packed_logits_are_those_of_training(method):
  model, params = trained(config(method))
  params = moved(params)
  expected = logits(model, params)
  made = packed_params(model, params)
  found = logits(pack.for_packed(model, None), made)
  np.testing.assert_allclose(
    found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
  )
  kinds = {
    path: type(leaf).__name__ for path, leaf in folder.flat(made).items()
  }
  kernels = {p: k for p, k in kinds.items() if p.endswith('/kernel')}
  if method == 'fp':
    assert set(kinds.values()) == {'ArrayImpl'}
  elif method == 'mixed':
    kept = {p for p, k in kernels.items() if k == 'QTensor'}
    assert {
      p.removeprefix('block_0/').replace('block_1', 'more') for p in kept
    } == {f'{name}/kernel' for name in KEPT}
  else:
    assert set(kernels.values()) == {'PackedMatrix'}
  # What a quantizer learned is in the matrices.
  assert not [p for p in kinds if re.search('learned|gain_|clip_', p)]


@pytest.mark.skipif(
  not native.variants(), reason=f'the C++ extension is {native.status()}'
)
@pytest.mark.parametrize('method', ['pquant8', 'mixed'])
def test_inputs_of_few_tokens_are_quantized_in_one_call(method, monkeypatch):
  model, params = trained(config(method))
  made = packed_params(model, params)
  here = pack.for_packed(model, None)

  def run(model, params):
    return model.apply({'params': params}, TOKENS[:1], method='logits')[0]

  def text(model, params):
    return str(jax.make_jaxpr(lambda p: run(model, p))(params))

  assert 'qat_act_quant' in text(here, made)
  assert 'qat_act_quant' not in text(model, params)
  found = jax.jit(lambda p: run(here, p))(made)
  monkeypatch.setattr(packed_dot, 'few_codes', lambda *_: None)
  assert 'qat_act_quant' not in text(here, made)
  np.testing.assert_array_equal(jax.jit(lambda p: run(here, p))(made), found)


def test_floats_are_as_small_as_the_model_reads_them():
  fields = {'model.tied_embeddings': False}
  model, params = trained(config('pquant8', fields))
  assert pack.lossless_floats(model) == 'float32'
  other = transformer.changed(model, dtype='bfloat16', dot_dtype='bfloat16')
  assert pack.lossless_floats(other) == 'bfloat16'
  flat = folder.flat(packed_params(model, params, floats='bfloat16'))
  dtypes = {p: leaf.dtype for p, leaf in flat.items() if hasattr(leaf, 'dtype')}
  small = {p for p, dtype in dtypes.items() if dtype == jnp.bfloat16}
  assert small == {'embed/embedding', 'head'}
  assert set(dtypes.values()) == {np.dtype('f4'), jnp.dtype('bfloat16')}
  assert 'block_0/ffn/router' in dtypes
  with pytest.raises(ValueError, match="'float16'; one of"):
    packed_params(model, params, floats='float16')


def test_layers_that_are_stacked_are_packed_one_by_one():
  # Compared with what is there: more would be a second set of weights.
  fields = {'model.n_layers': 6, 'model.scan_layers': True}
  model, params = trained(config('pquant', fields))
  jax.block_until_ready(params)
  latent = sum(a.nbytes for a in jax.tree.leaves(params))

  def alive():
    return sum(a.nbytes for a in jax.live_arrays())

  before, paths, most = alive(), [], 0
  for path, leaf in pack.leaves(model, params, CPU):
    jax.block_until_ready(leaf)
    most = max(most, alive() - before)
    paths.append(path)
  assert most < 0.3 * latent
  by_layer, params = transformer.unscanned(model, params)
  flat = folder.flat(params)
  assert sorted(paths) == sorted(flat)
  # Each layer's are its own.
  expected = folder.flat(packed_params(by_layer, params))
  for path, leaf in pack.leaves(model, stacked.stacked(params), CPU):
    jax.tree.map(np.testing.assert_array_equal, leaf, expected[path])


@pytest.mark.parametrize('experts', [1, 8])
def test_a_large_model_takes_the_bytes_of_its_codes(experts):
  """From shapes alone: codes, branch, embeddings and norms, within 2 %."""
  c = pquant.get_config('1.3b').copy_and_resolve_references().unlock()
  c.model.n_experts = experts
  model = transformer.build(c.lock(), 'cpu', 1)
  params = transformer.abstract_params(model)
  m = c.model
  wide, narrow = m.d_ff - m.branch_width, m.branch_width
  bits = m.n_layers * (4 * m.d_model**2 + 3 * m.d_model * wide)
  branch = m.n_layers * experts * 3 * m.d_model * narrow
  router = m.n_layers * (experts > 1) * m.d_model * experts
  norms = sum(
    4 * leaf.size
    for path, leaf in folder.flat(params).items()
    if 'norm' in path
  )
  for floats, size in (('float32', 4), ('bfloat16', 2)):
    expected = (
      bits / 8 + branch + m.vocab_size * m.d_model * size + norms + 4 * router
    )
    found = pack.sizes(pack.abstract(model, params, CPU, floats))
    assert sum(found.values()) == pytest.approx(expected, rel=0.02)
    assert found['1bit'] == pytest.approx(bits / 8, rel=0.02)
    assert found['int8'] == pytest.approx(branch, rel=0.02)


# --------------------------------------------------------------------- a folder


@pytest.fixture(scope='module')
def written(saved, tmp_path_factory):
  """A packed run, and the folder of it."""
  out = tmp_path_factory.mktemp('packed') / 'model'
  loaded = load.load_model(saved.workdir, None, by_layer=False)
  pack.save(out, loaded)
  return pack.pack(loaded), out


def test_a_folder_holds_the_packed_model(written):
  made, out = written
  again = load.load_model(out, None)
  assert again.source == made.source
  assert again.source[load.PACKED]['target'] == 'cpu'
  assert again.source[load.PACKED]['bytes'] == pack.sizes(made.params)
  assert jax.tree.structure(again.params) == jax.tree.structure(made.params)
  jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
  assert (again.begin, again.end) == (made.begin, made.end)
  # To pack it again changes nothing.
  twice = pack.pack(again)
  jax.tree.map(np.testing.assert_array_equal, twice.params, made.params)
  about = folder.open_folder(out).leaves['block_0/attn/q/kernel']
  assert about['shape'] == [32, 32]
  assert about['packed'] == {
    'kind': 'PackedMatrix',
    'shape': [32, 32],
    'format': '1bit',
    'axis': -1,
    'block': 64,
  }


def test_another_machine_packs_for_itself(written, monkeypatch):
  made, out = written
  tpu = dispatch.Target('tpu', 'v5e')
  monkeypatch.setattr(dispatch, 'here', lambda: tpu)
  found = load.load_model(out, None).params['block_0']['attn']['q']['kernel']
  kernel = made.params['block_0']['attn']['q']['kernel']
  assert (found.axis, found.block) == (-2, 128)
  jax.tree.map(np.testing.assert_array_equal, packed.repack(kernel, tpu), found)


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('params-00001.safetensors', 'params-00001.safetensors'),
    ('tokenizer.json', 'tokenizer.json'),
    (manifest.FILE, 'manifest.json is missing'),
  ],
)
def test_a_file_that_is_missing_or_damaged_is_named(
  written, tmp_path, name, expected
):
  copy = tmp_path / 'model'
  shutil.copytree(written[1], copy)
  file = copy / name
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  with pytest.raises(manifest.CorruptError, match=name):
    load.load_model(copy, None)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=expected):
    load.load_model(copy, None)
