"""Imported and exported models compute what the library transformers does.

Both in float32 with the same formulas, so logits differ by the order of sums.
"""

import jax
import numpy as np
import pytest

from qat.infer import load
from qat.interop import hf
from tests.interop import conftest as small

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

T = 40  # Below every window and table, beyond the scaled wavelengths.
TOKENS_BT = np.random.default_rng(0).integers(0, 264, (2, T))


@pytest.fixture(autouse=True)
def quiet():
  transformers.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()


def published(folder) -> np.ndarray:
  """transformers' logits of a folder."""
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  assert not any(report[key] for key in report), report
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS_BT)).logits.numpy()


def logits(loaded) -> np.ndarray:
  run = jax.jit(
    lambda p, x: loaded.model.apply({'params': p}, x, method='logits')
  )
  return np.asarray(run(loaded.params, TOKENS_BT)[0])


@pytest.fixture(params=sorted(small.CONFIGS))
def written(request, tmp_path):
  """A randomly initialised model that transformers saved."""
  config = dict(small.CONFIGS[request.param])
  made = transformers.AutoConfig.for_model(config.pop('model_type'), **config)
  model = transformers.AutoModelForCausalLM.from_config(made)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.normal_(0, 0.3, generator=generator)
  model.save_pretrained(tmp_path / 'theirs')
  return tmp_path / 'theirs'


def test_logits_are_those_of_transformers(written, tokenizer, base, tmp_path):
  (written / 'tokenizer.json').write_text(tokenizer.to_str())
  loaded = load.load_model(written, base)
  theirs = published(written)
  ours = logits(loaded)
  scale = np.abs(theirs).max()
  assert scale > 1
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)
  # And back.
  hf.export(
    tmp_path / 'out',
    loaded.config,
    loaded.params,
    loaded.tokenizer,
    begin=0,
    end=0,
    dtype='float32',
    shard_bytes=20_000,
  )
  assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 1
  np.testing.assert_allclose(
    published(tmp_path / 'out'), theirs, rtol=1e-4, atol=1e-5 * scale
  )
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  text = 'the ship, é'
  expected = tokenizer.encode(text, add_special_tokens=False).ids
  assert again(text, add_special_tokens=False)['input_ids'] == expected
