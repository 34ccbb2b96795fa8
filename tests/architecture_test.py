"""Rules of the repository that a program can hold, read from its sources.

A rule is a function from a file to what is wrong with it; the tests apply the
rules to every file, and each rule to a file that breaks it.
"""

import ast
import functools
import graphlib
from importlib import metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAX_LINES = 350

# From below to above: a module imports from its own layer and from those below
# it. A name stands for everything under it that has no line of its own.
LAYERS = (
  'pallas_kernels',
  'qat.quant',
  'qat.nn',
  'qat',  # Data, optimizer, checkpoints, metrics, report, ...
  'qat.train',
  'qat.main',
  'scripts',
)

# All that a layer may import from outside the repository and Python's library.
ALLOWED = {
  'pallas_kernels': {'jax', 'numpy'},
  'qat.quant': {'jax', 'numpy'},  # Functions on arrays, for any library.
  'qat.zo': {'jax', 'numpy'},
  'configs': {'ml_collections'},
}
# The part of qat.ptq that knows models; the rest are functions on arrays.
PTQ_WALK = (
  *('apply', 'calibrate', 'examples', 'gradients', 'job', 'omniquant_train'),
  *('partial', 'plan', 'prepare', 'programs', 'report'),
)

# What runs code that a file holds, when the file comes from somewhere else.
UNSAFE_MODULES = {
  'cloudpickle',
  'dill',
  'joblib',
  'marshal',
  'pickle',
  'shelve',
}
UNSAFE_CALLS = {'__import__', 'compile', 'eval', 'exec'}

# A path of somebody's machine.
FOREIGN = re.compile(r'(?<![\w.])/(home|root|work|Users)/|\.\./shared')

TREES = ('configs', 'pallas_kernels', 'qat', 'scripts', 'tests')
SOURCES = sorted(
  str(path.relative_to(ROOT))
  for t in TREES
  for path in (ROOT / t).rglob('*.py')
)
CODE = [path for path in SOURCES if not path.startswith('tests/')]
# By stem: 'configs/pquant.py', 'configs/ptq/gptq.py', ...
METHODS = {
  pathlib.Path(path).stem: path
  for path in SOURCES
  if path.startswith('configs/')
  and pathlib.Path(path).stem not in ('__init__', 'common')
}


def read(path: str) -> str:
  return (ROOT / path).read_text('utf-8')


def module_name(path: str) -> str:
  """'qat/nn/ffn.py' -> 'qat.nn.ffn', 'qat/nn/__init__.py' -> 'qat.nn'."""
  return path.removesuffix('.py').replace('/', '.').removesuffix('.__init__')


MODULES = {module_name(path): path for path in SOURCES}


def imports(source: str) -> set[str]:
  """The modules that a source imports, wherever in it the import stands.

  `from a import b` is 'a.b' where that is a module of the repository.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: a relative import'
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        found.add(full if full in MODULES else node.module)
  return found


def is_under(module: str, name: str) -> bool:
  return module == name or module.startswith(name + '.')


def layer(module: str) -> str | None:
  """The longest name of `LAYERS` that the module is under, if it has one."""
  return max((n for n in LAYERS if is_under(module, n)), key=len, default=None)


def is_own(module: str) -> bool:
  return module.split('.')[0] in TREES


def wrong_directions(module: str, source: str) -> list[str]:
  """The imports that point upwards, or to where nothing may point."""
  own = {name for name in imports(source) if is_own(name)}
  if is_under(module, 'configs'):
    return sorted(name for name in own if not is_under(name, 'configs'))
  if is_under(module, 'scripts'):
    own = {name for name in own if not is_under(name, 'configs')}
  rank = LAYERS.index(layer(module))
  return sorted(name for name in own if layer(name) not in LAYERS[: rank + 1])


def foreign_imports(source: str) -> set[str]:
  """Top-level packages that are neither ours nor in Python's library."""
  tops = {name.split('.')[0] for name in imports(source) if not is_own(name)}
  return tops - set(sys.stdlib_module_names)


def unsafe(source: str) -> list[str]:
  """What in the source would run code that it was handed as data."""
  found = [name for name in imports(source) if name in UNSAFE_MODULES]
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
      found.append(node.func.id)
    for keyword in node.keywords:
      off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
      if keyword.arg == 'allow_pickle' and not off:
        found.append('allow_pickle')
  return sorted(found)


def hidden_defaults(source: str) -> list[str]:
  """Calls of `.get` on something whose name says that it is a config."""
  return [
    ast.unparse(node)
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == 'get'
    and re.match(r'([\w.]+\.)?(\w*config|cfg)\b', ast.unparse(node.func.value))
  ]


def has_code(source: str) -> bool:
  """Whether a module is more than a docstring and imports."""
  plain = (ast.Import, ast.ImportFrom)
  return any(
    not isinstance(node, plain)
    and not (
      isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    for node in ast.parse(source).body
  )


def distribution(name: str) -> str:
  """'orbax_checkpoint>=0.12' -> 'orbax-checkpoint'."""
  return re.match(r'[\w.-]+', name)[0].replace('_', '-').lower()


@functools.cache
def declared() -> dict[str, set[str]]:
  """The distributions in setup.py: those of every install, and each extra's."""
  constants = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.parse(read('setup.py')).body
    if isinstance(node, ast.Assign)
    and node.targets[0].id in ('EXTRAS', 'REQUIRED')
  }
  everything = constants['EXTRAS'] | {'': constants['REQUIRED']}
  return {key: set(map(distribution, v)) for key, v in everything.items()}


@functools.cache
def installed() -> dict[str, set[str]]:
  """The distributions that bring each top-level package that is installed."""
  return {
    top: set(map(distribution, names))
    for top, names in metadata.packages_distributions().items()
  }


@pytest.mark.parametrize('path', CODE)
def test_imports_point_down(path):
  assert not wrong_directions(module_name(path), read(path))


def test_no_module_imports_itself_in_a_circle():
  graph = {
    module: {name for name in imports(read(path)) if name in MODULES}
    for module, path in MODULES.items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError.


@pytest.mark.parametrize('path', CODE)
def test_a_layer_imports_only_the_libraries_it_may(path):
  module = module_name(path)
  for name, libraries in ALLOWED.items():
    if is_under(module, name):
      assert foreign_imports(read(path)) <= libraries


@pytest.mark.parametrize(
  'path', [path for path in SOURCES if path.startswith('qat/ptq/')]
)
def test_a_method_after_training_is_functions_on_arrays(path):
  if pathlib.Path(path).stem not in PTQ_WALK:
    assert foreign_imports(read(path)) <= {'jax', 'numpy'}
    own = {name for name in imports(read(path)) if is_own(name)}
    walk = {f'qat.ptq.{stem}' for stem in PTQ_WALK}
    for name in own - walk:
      assert is_under(name, 'qat.quant') or is_under(name, 'qat.ptq')
    assert not own & walk


@pytest.mark.parametrize('path', SOURCES)
def test_what_is_imported_is_declared_in_setup_py(path):
  # Of extras, code may import what it can do without; a test, what it needs.
  dists = declared()
  known = dists[''] | dists['hf'] | dists['interop'] | dists['llama']
  if path.startswith('scripts/bench'):
    known |= dists['compare']
  if path.startswith('tests/'):
    known |= dists['test']
  for top in foreign_imports(read(path)):
    # Of one that is not there, the name may say what it is for: llama_cpp.
    name = distribution(top)
    owners = installed().get(top, {name, f'{name}-python'})
    assert owners & known, f'{path} imports {top}; setup.py does not name it'


@pytest.mark.parametrize('path', CODE)
def test_nothing_runs_code_that_came_as_data(path):
  assert not unsafe(read(path))


@pytest.mark.parametrize('path', CODE)
def test_every_setting_stands_in_the_config(path):
  assert not hidden_defaults(read(path))


@pytest.mark.parametrize('path', SOURCES)
def test_a_file_is_short_described_and_named_for_what_it_does(path):
  source = read(path)
  assert len(source.splitlines()) <= MAX_LINES
  assert ast.get_docstring(ast.parse(source)) or not source
  assert pathlib.Path(path).stem.strip('_') not in ('util', 'utils')


@pytest.mark.parametrize(
  'path',
  [p for p in SOURCES if p.startswith('qat/') and has_code(read(p))],
)
def test_a_module_has_a_file_of_tests(path):
  test = path.replace('qat/', 'tests/', 1).replace('.py', '_test.py')
  assert (ROOT / test).is_file(), f'{path} needs {test}'


@pytest.mark.parametrize('path', [p for p in CODE if 'scripts/' not in p])
def test_a_folder_of_modules_is_a_package(path):
  # setuptools leaves out a folder without one, and nothing says so.
  assert (ROOT / path).with_name('__init__.py').is_file()


def test_a_method_has_one_stem_everywhere():
  pages = {path.stem for path in (ROOT / 'docs' / 'methods').glob('*.md')}
  rows = {
    stem
    for line in read('README.md').splitlines()
    if line.startswith('|')
    for stem in re.findall(r'docs/methods/(\w+)\.md', line)
    if METHODS.get(stem, '?') in line
  }
  assert METHODS
  assert pages == METHODS.keys(), 'configs/<stem>.py and docs/methods/<stem>.md'
  assert rows == METHODS.keys(), (
    'a row of the README names configs/<stem>.py and docs/methods/<stem>.md'
  )


def texts() -> list[pathlib.Path]:
  """Every file that somebody wrote, by hand, as text."""
  folders = ('.ci', 'docs', *TREES)
  files = [p for f in folders for p in (ROOT / f).rglob('*') if p.is_file()]
  files += [p for p in ROOT.iterdir() if p.is_file()]
  binary = {'.gz', '.npz', '.png', '.pyc', '.so', '.xz', '.zst'}
  return [p for p in files if p.suffix not in binary]


def test_nothing_names_a_path_of_somebodys_machine():
  bad = [str(p) for p in texts() if FOREIGN.search(p.read_text('utf-8'))]
  assert not bad
