"""Does pretraining help text mining, and which reading of the text? Measured at laptop scale on two public corpora.

A pretrained backbone is fine-tuned on NCBI-disease (entities) and ChemProt (relations), next to random weights of the
same architecture, and for entities with each `reading`. A class is predicted from the state after the whole text, so
ChemProt is read once. All runs of a task have the same data, learning rate and number of passes over it; a 20th of the
training split chooses among their checkpoints, and the test split is predicted once. Every figure has two
uncertainties: an interval over sentences, by the bootstrap, and the range over seeds.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from benchmarks.seeds import OfSeeds, difference, markdown, run_on_cores, verdict, with_interval
from biomamba_jax import files
from biomamba_jax.config import ExamplesConfig
from biomamba_jax.config.checks import InnerFraction, PositiveFloat, PositiveInt, Settings
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.statistics import Resampling

CONFIGS = Path("configs/text_mining")
CONDITIONS = {
    "random weights, once": "random",
    "pretrained, once": "once",
    "pretrained, echo": "echo",
    "pretrained, bidirectional": "bidirectional",
}
"""Name of each condition in the table, and in the names of its runs: its reading, or "random"."""
TASKS = {"ncbi_disease": list(CONDITIONS.values()), "chemprot": ["random", "once"]}
"""Conditions of each task."""


@dataclass(frozen=True)
class TextMiningBenchmark(Settings):
    """Settings of the comparison."""

    model: str = "runs/quickstart"
    """The pretrained model, with its tokenizer."""
    data: str = "data/text_mining"
    """Folder with ncbi_disease/ and chemprot/."""
    output: str = "runs/text_mining"
    """Folder of the runs, table.md and table.json."""
    seeds: PositiveInt = 3
    """Number of seeds, which decide a head's initial weights, random backbones and the order of the text."""
    epochs: PositiveFloat = 1.2
    """Passes of each run over the training split, in steps of 2,048 tokens."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate."""
    confidence: InnerFraction = 0.95
    """Confidence level of the intervals over sentences."""


def compare_text_mining(config: TextMiningBenchmark) -> str:
    """Run whatever is not done yet, print the table, write it as Markdown and JSON, and return it."""
    from biomamba_jax.environment import environment

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    known, settings = output / "settings.json", {k: getattr(config, k) for k in ("model", "epochs", "learning_rate")}
    if known.exists() and files.read_json(known) != settings:
        raise UserError(f"{known}: its runs have other settings; give another --output")
    files.write_json(known, settings)
    write_random_models(config)
    run_on_cores([[command] for command in commands(config)])
    table, figures = results(config)
    files.write_json(output / "table.json", {"figures": figures, "settings": asdict(config), "about": environment()})
    files.write_text(output / "table.md", table)
    print(table)
    return table


def write_random_models(config: TextMiningBenchmark) -> None:
    """Write models like the pretrained one with random weights, where there are none yet."""
    import jax
    from flax import nnx

    from biomamba_jax.interop import Weights, read_model, write_model
    from biomamba_jax.model import init_params

    like = read_model(config.model)
    for seed in range(config.seeds):
        if not (folder := Path(config.output, f"random-{seed}")).exists():
            params = jax.device_get(init_params(like.config, nnx.Rngs(seed)))
            write_model(Weights(like.config, params, like.tokenizer_file), folder, "native")


def commands(config: TextMiningBenchmark) -> Iterator[list[str]]:
    """Yield the arguments of every run without results; one that was interrupted goes on from its checkpoint."""
    for seed, task, condition in keys(config):
        raw, run_dir = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text()), _run_dir(config, seed, task, condition)
        given = {
            "run_dir": run_dir,
            "init_from": f"{config.output}/random-{seed}" if condition == "random" else config.model,
            "reading": "once" if condition == "random" else condition,
            "data.files": _moved(raw["data"]["files"], config),
            "data.test": _moved(raw["data"]["test"], config),
            "data.development": "[]",
            "data.development_fraction": 0.05,
            "data.batch_size": 4,
            "optimizer.learning_rate": config.learning_rate,
            "train.epochs": config.epochs,
            "train.seed": seed,
            "tensorboard": "false",
        }
        if not (run_dir / "results.json").exists():
            settings = [f"--{key}={value}" for key, value in given.items()]
            yield ["biomamba_jax.finetune", "--config", str(CONFIGS / f"{task}.yaml"), *settings]


def keys(config: TextMiningBenchmark) -> Iterator[tuple[int, str, str]]:
    """Yield (seed, task, condition) of every run."""
    for seed in range(config.seeds):
        for task, conditions in TASKS.items():
            yield from ((seed, task, condition) for condition in conditions)


def _run_dir(config: TextMiningBenchmark, seed: int, task: str, condition: str) -> Path:
    return Path(config.output, f"{task}-{condition}-{seed}")


def _moved(paths: list[str], config: TextMiningBenchmark) -> str:
    """Return a config's paths below data/text_mining as a list of paths below `config.data`."""
    return str([str(Path(config.data, *Path(path).parts[2:])) for path in paths]).replace("'", "")


def results(config: TextMiningBenchmark) -> tuple[str, dict[str, object]]:
    """Return the table with a sentence on each difference as Markdown, and its figures for JSON."""
    resampling = Resampling(confidence=config.confidence)
    rows, sentences, figures = [], [], dict[str, object]()
    for task, conditions in TASKS.items():
        found = {each: _of_seeds(config, task, each) for each in conditions}
        count = found["once"].over.shape[1]
        cells = [found[key].cell(resampling) if key in found else "–" for key in CONDITIONS.values()]
        rows.append([f"{task}, {count:,} sentences", *cells])
        for better, worse in [("once", "random"), ("echo", "once"), ("bidirectional", "once")]:
            if better in found:
                effect, by_seed = difference(found[better], found[worse], resampling)
                sentences.append(
                    f"{task}, {better} minus {worse}: {with_interval(effect)} points of F1 "
                    f"[{by_seed.min():.1f} to {by_seed.max():.1f}]; {verdict(effect, by_seed)}"
                )
        figures[task] = {
            key: asdict(each.estimate(resampling)) | {"seeds": each.by_seed().tolist()} for key, each in found.items()
        }
    head = f"test F1, %: all seeds ({100 * config.confidence:g} % interval over sentences) [range over seeds]"
    return markdown([[head, *CONDITIONS], *rows]) + "".join(f"\n{each}\n" for each in sentences), figures


def _of_seeds(config: TextMiningBenchmark, task: str, condition: str) -> OfSeeds:
    """Return 200 times the correct items over the sum of true and predicted ones, by sentence: F1 in percent."""
    of_seed = [_counts(_run_dir(config, seed, task, condition), task, config) for seed in range(config.seeds)]
    correct, items = (np.array(sums, np.float64) for sums in zip(*of_seed, strict=True))
    return OfSeeds(200.0 * correct, items)


def _counts(run_dir: Path, task: str, config: TextMiningBenchmark) -> tuple[list[int], list[int]]:
    """Return the correct, and the true and predicted items of each sentence of the test split."""
    kind = "conll" if task == "ncbi_disease" else "marked"
    lines = [line for _, line in files.read_json_lines(run_dir / "predictions" / f"{kind}-test.jsonl")]
    if kind == "conll":
        pairs = [({tuple(s[:3]) for s in x["spans"]}, {tuple(s[:3]) for s in x["gold"]["spans"]}) for x in lines]
        return [len(found & true) for found, true in pairs], [len(found) + len(true) for found, true in pairs]
    # Each pair of entities of a sentence is a line; without a negative class F1 is the share of correct ones.
    from biomamba_jax.data.annotation_files import read_annotated

    texts = read_annotated(str(Path(config.data, task, "test.txt")), ExamplesConfig(format="marked"))
    plain = [re.sub(r"<< | >>|\[\[ | \]\]", "", text.text) for text in texts]
    place = {sentence: index for index, sentence in enumerate(dict.fromkeys(plain))}
    own = np.array([place[sentence] for sentence in plain])
    return np.bincount(own, [line["correct"] for line in lines]).tolist(), (2 * np.bincount(own)).tolist()
