"""Stands in for gcloud, xpk, kubectl, srun and the like on PATH: notes how it was called and answers from a script.

The folder STAND_INS holds `calls`, one JSON list of words a call, and `answers.json`, a list of [pattern, answers]: the
first pattern found in the joined words decides; each call takes the next answer, the last one stays. An answer is
[exit status, output]. What no pattern matches succeeds without a word.
"""

import json
import os
import re
import sys
from pathlib import Path

folder = Path(os.environ["STAND_INS"])
words = sys.argv[1:]
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\n")
rules = json.loads((folder / "answers.json").read_text())
status, output = 0, ""
for rule in rules:
    pattern, answers = rule
    if re.search(pattern, " ".join(words)):
        status, output = answers[0]
        if len(answers) > 1:
            del answers[0]
            (folder / "answers.json").write_text(json.dumps(rules))
        break
print(output, end="")
sys.exit(status)
