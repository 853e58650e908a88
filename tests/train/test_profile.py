"""Traces of chosen steps, which XProf and Perfetto read."""

import gzip
import json

import pytest
from synthetic import write_shards
from test_pretrain import SMALL

from biomamba_jax.errors import UserError
from biomamba_jax.pretrain import main

pytestmark = pytest.mark.usefixtures("shared_programs")
TINY = [*SMALL, "--train.steps=5", "--train.eval_batches=1", "--tensorboard=false"]


@pytest.mark.slow
def test_the_chosen_steps_and_no_others_are_in_the_trace_by_name_and_steps_already_done_are_said_to_be_in_none(
    tmp_path, capsys
):
    write_shards(tmp_path / "shards")
    words = [*TINY, f"--data.path={tmp_path}/shards", f"--run_dir={tmp_path}/run", "--train.profile_steps", "2", "3"]
    main(words)
    (folder,) = (tmp_path / "run" / "profile" / "plugins" / "profile").iterdir()  # where XProf looks
    assert list(folder.glob("*.xplane.pb"))
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train_step"]
    assert sorted(map(int, steps)) == [2, 3]
    main([*words, "--train.steps=6"])
    assert "train.profile_steps = [2, 3]: no trace, this start goes from step 5 to 6" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["[3]", "[3, 2]", "[0, 2]", "[1, 2, 3]"])
def test_steps_that_are_no_range_are_refused(steps):
    with pytest.raises(UserError, match=r"train\.profile_steps = .*: must be a first and a last step"):
        main([*TINY, f"--train.profile_steps={steps}"])
