"""Alignment runs for `test_alignment_processes.py`, in as many processes as this script is started in.

torchrun --nproc_per_node 2 tests/trajectory/alignment_on_cpu.py PIPELINE OUTPUT [RUN ...]
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from dina_lrm.alignment.config import AlignConfig, MonitorConfig
from dina_lrm.alignment.dpo import Dpo
from dina_lrm.alignment.run import Run, Update
from dina_lrm.build.alignment import algorithm_of
from dina_lrm.data.latents import LatentPairs
from dina_lrm.sampling.rewards import LatentReward
from tests.trajectory.test_alignment import ALGORITHMS, first_latents, given_pairs, new_run, small

RARELY = MonitorConfig(every=9, num_prompts=3, grid_size=2)
RUNS: dict[str, AlignConfig] = {
    name: small(config, num_steps=2, monitor=RARELY) for name, config in ALGORITHMS.items()
}
# AdamW steps by g / (|g| + eps): where pairs nearly cancel, with its usual eps, the rounding of g.
RUNS["dpo-given"] = replace(
    RUNS["dpo"],
    pairs="given",  # type: ignore[call-arg]
    optimizer=replace(RUNS["dpo"].optimizer, eps=1e-3),
)
FLAT = ("grpo", "grpo-guard", "dpo", "step-dpo", "d3po")
"""Algorithms that learn from differences: also run with one process that has none."""


class PartlyFlat(LatentReward):
    """The same score for whatever is made of some prompts."""

    flat: ClassVar[set[str]] = set()

    def _flattened(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.where(torch.tensor([prompt in self.flat for prompt in prompts]), 1.0, scores.float())

    def __call__(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self._flattened(super().__call__(latents, prompts, seeds), prompts)

    def of_state(self, noisy_latents: Tensor, prompts: Sequence[str], timestep: Tensor) -> Tensor:
        return self._flattened(super().of_state(noisy_latents, prompts, timestep), prompts)


def prompts_of_the_second_process(run: Run, step: int) -> set[str]:
    """As `Run.draw` hands them out to the second of two."""
    own = run.processes.index, run.processes.count
    run.processes.index, run.processes.count = 1, 2
    prompts, _ = run.draw(step)
    run.processes.index, run.processes.count = own
    return set(prompts)


def divided_pairs(run: Run) -> LatentPairs:
    """Six pairs, of which two are ties and one is of divided votes."""
    return given_pairs(run, first_latents(run), torch.tensor([1.0, 0.5, 0.8, 1.0, 0.5, 1.0]))


def one_run(pipeline: Path, output: Path, name: str) -> dict[str, Any]:
    """A run of `RUNS`, or of one of them whose second process has nothing to learn ("flat-...")."""
    config = replace(RUNS[name.removeprefix("flat-")], output=str(output / name))
    run = new_run(pipeline, config)
    algorithm: Update = Dpo(config, divided_pairs(run)) if name == "dpo-given" else algorithm_of(config)  # type: ignore[arg-type]
    if not name.startswith("flat-"):
        run.train(algorithm)
        return {}
    assert isinstance(run.reward, LatentReward)
    reward = PartlyFlat(run.reward.model)
    run.reward = reward
    flat: list[bool] = []

    def update(run: Run, step: int) -> dict[str, float]:
        reward.flat.clear()
        reward.flat.update(prompts_of_the_second_process(run, step))
        flat.append(set(run.draw(step)[0]) <= reward.flat)
        return algorithm(run, step)

    run.train(update)
    return {"flat": flat}


def collectives_of_a_step(pipeline: Path) -> dict[str, int]:
    """How many there are in one optimizer step, and how many parameters it has."""
    run = new_run(pipeline, RUNS["grpo"])
    calls = 0
    plain = torch.distributed.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*arguments, **options)

    torch.distributed.all_reduce = counted
    try:
        run.learn()
    finally:
        torch.distributed.all_reduce = plain
    return {"collectives": calls, "parameters": len(run.state.parameters)}


def failing_alone(pipeline: Path, output: Path, when: int) -> str:
    """What each process says when the second one fails in an update."""
    run = new_run(pipeline, replace(RUNS["grpo"], output=str(output / f"failing-{when}")))
    algorithm = algorithm_of(RUNS["grpo"])

    def update(run: Run, step: int) -> dict[str, float]:
        if step == when and run.processes.index == 1:
            raise MemoryError("no memory left")
        return algorithm(run, step)

    try:
        run.train(update)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def main(pipeline: Path, output: Path, names: Sequence[str]) -> None:
    found: dict[str, Any] = {}
    for name in names or (*RUNS, *(f"flat-{name}" for name in FLAT)):
        found[name] = one_run(pipeline, output, name)
    found["step"] = collectives_of_a_step(pipeline)
    found["failing"] = [failing_alone(pipeline, output, when) for when in (0, 1)]
    (output / f"process-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    torch.distributed.destroy_process_group()
