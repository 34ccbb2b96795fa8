"""Metadata, dependencies and extras of `qat`; exact versions: constraints.txt.

A lower bound is where support begins; the tests run on the exact versions.
"""

import importlib.util
import pathlib

import setuptools
from setuptools.command import build_ext

HERE = pathlib.Path(__file__).parent

REQUIRED = [
  'absl-py>=2.1',  # Flags and logging of the command line.
  'array-record>=0.8',  # Token shards.
  'etils[epath]>=1.9',  # Paths, as the checkpointer takes them.
  'flax>=0.12',
  'grain>=0.2.15',  # The loader: resumable, in processes or threads.
  'jax>=0.10',
  'matplotlib>=3.9',  # Pictures as files.
  'ml_collections>=1.0',
  'numpy>=2.0',
  'optax>=0.2.6',
  'orbax-checkpoint>=0.12',
  'plotly>=6.0',  # Pictures in the report.
  'pyarrow>=18',  # Parquet files of documents.
  'rich>=13.9',  # Progress and tables in the terminal.
  'safetensors>=0.6',  # Parameters of model folders.
  'tensorboardX>=2.6.2',
  'tokenizers>=0.21',
  'zstandard>=0.23',  # Compressed corpora.
]

EXTRAS = {
  'gpu': ['jax[cuda13]'],
  'tpu': ['jax[tpu]'],
  'interop': ['gguf>=0.17', 'huggingface-hub>=1.0'],  # Models of others.
  'hf': ['datasets>=4.0', 'huggingface-hub>=1.0'],  # Corpora of the hub.
  'compare': ['torch>=2.9', 'transformers>=5.0'],  # Tests against others.
  # What `bench.py decode --llama` is compared with; compiled from source.
  'llama': ['gguf>=0.19', 'llama-cpp-python>=0.3.36'],
  'test': [
    'gguf>=0.19',
    'hypothesis>=6.100',
    'ml_dtypes>=0.5',
    'pytest>=9.0',
    'pytest-xdist>=3.8',
    'ruff>=0.14',
  ],
}

NATIVE = 'pallas_kernels/native'


class BuildNative(build_ext.build_ext):
  """Builds the C++ extension where that works, and notes why where it fails.

  The package needs no extension; `python -m qat.doctor` shows the note.
  """

  def run(self):
    """Compiles; in place for an editable install, as setuptools decides."""
    base = HERE if self.inplace else pathlib.Path(self.build_lib)
    note = base / NATIVE / '_native_failure.txt'
    note.unlink(missing_ok=True)
    try:
      jaxlib = importlib.util.find_spec('jaxlib')
      if jaxlib is None:
        raise RuntimeError('jaxlib, which has the headers, is not installed')
      (folder,) = jaxlib.submodule_search_locations
      for extension in self.extensions:
        extension.extra_compile_args.append(f'-isystem{folder}/include')
      super().run()
    except Exception as error:  # No compiler, no headers, a system unlike ours.
      for extension in self.extensions:  # What older sources gave.
        (base / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
      self.extensions = []
      note.parent.mkdir(parents=True, exist_ok=True)
      note.write_text(f'the build failed: {error}\n', 'utf-8')


setuptools.setup(
  name='qat',
  version='0.1.0',
  description='Pretraining of language models with extremely low-bit weights',
  long_description=(HERE / 'README.md').read_text('utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=setuptools.find_packages(
    include=['qat', 'qat.*', 'pallas_kernels*', 'configs*']
  ),
  package_data={'qat': ['data/corpus/*', '*.html', '*.css', '*.js']},
  ext_modules=[
    setuptools.Extension(
      'pallas_kernels.native._native',
      sources=[
        f'{NATIVE}/{name}.cc'
        for name in (
          *('act_quant', 'bfloat16_matmul', 'cached_attention'),
          *('int8_matmul', 'packed_matmul', 'read_memory'),
        )
      ],
      depends=[
        f'{NATIVE}/{name}.h' for name in ('floats', 'parallel', 'variants')
      ],
      language='c++',
      # Not `-march`: functions name the instructions they use. GCC warns of
      # its own intrinsics. `BuildNative` adds the folder of jaxlib's headers.
      extra_compile_args=[
        *('-std=c++17', '-O3', '-g0', '-ffp-contract=off'),
        '-Wno-uninitialized',
      ],
    )
  ],
  cmdclass={'build_ext': BuildNative},
  install_requires=REQUIRED,
  extras_require=EXTRAS,
)
