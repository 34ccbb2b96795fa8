"""Made-up analyses of sensitivity, as of a run that went as runs go."""

from collections.abc import Iterable

import numpy as np

from qat import sensitivity


def make(
  paths: Iterable[str], rng: np.random.Generator
) -> sensitivity.Analysis:
  """Latent weights, and quantized ones in narrow branches, differ most."""
  return {
    path: {
      'latent': _stats(rng, 0.7),
      'quantized': _stats(rng, 0.2 + 0.4 * ('narrow' in path)),
    }
    for path in paths
  }


def _stats(rng: np.random.Generator, spread: float) -> sensitivity.Stats:
  map_NK = rng.normal(0, 0.3, (96, 96)) + rng.normal(0, spread, 96)
  map_NK[int(96 * rng.random())] += spread
  histogram = np.histogram(map_NK, sensitivity.EDGES)[0] / map_NK.size
  return sensitivity.Stats(
    gini=min(0.95, spread * (0.8 + 0.2 * rng.random())),
    top1=0.1 * spread,
    mean=1.0,
    histogram=histogram.astype(np.float32),
    map_NK=map_NK.astype(np.float16),
  )
