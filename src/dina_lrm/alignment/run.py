"""What all alignment algorithms share: optimizer, average, evaluation, checkpoints, and what stops a run.

An algorithm is one function from the number of an update to what it measured; it calls `Run.learn` once or
more. All that is random in update n follows from (seed, n), so a resumed run gives the numbers of one that
was never stopped, and nothing random is stored.

On several processes each takes a share of the prompts, whole groups at a time, and gradients of the adapter
are averaged before every optimizer step. All processes take every optimizer step, whether or not there is
something to learn in their own share: an algorithm asks `Run.processes`, and not its own share, before it
leaves one out.

A checkpoint is written before the evaluation that is due at the same update, so that nothing that fails in an
evaluation loses updates; a run that goes on from there makes that evaluation first.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

import torch
from PIL import Image
from torch import Tensor

from dina_lrm.alignment.config import AlignConfig
from dina_lrm.alignment.gold import Evaluation, Gold, ask_all, best_evaluation, overoptimisation
from dina_lrm.alignment.processes import AlignmentError, Processes
from dina_lrm.alignment.record import Measures, RunResult, append_line, diversity, lines_until
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import atomic_folder, atomic_write, json_types, naming, recover_folder
from dina_lrm.runs.interrupt import Interrupt, Interrupted
from dina_lrm.runs.optimizer import adamw
from dina_lrm.runs.state import RunState
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rewards import Reward, checked
from dina_lrm.sampling.rollout import Trajectory, rollout, sample

__all__ = ["AlignmentError", "Run", "Update"]

Update = Callable[["Run", int], Measures]
"""One update of an algorithm: learns through `Run.learn`, and gives what it measured."""

DIVERSITY_SAMPLES = 4


class Run:
    """One alignment run.

    Args:
        policy: with an adapter.
        reward: what is maximised.
        prompts: to train on.
        held_out: to evaluate on; none of `prompts`.
        golds: independent scores of pictures, by name; the first is the gold score.
        on_evaluation: called with all evaluations so far, and the pictures of the last one (a row a prompt).
    """

    def __init__(
        self,
        config: AlignConfig,
        policy: Policy,
        reward: Reward,
        prompts: Sequence[str],
        held_out: Sequence[str],
        *,
        golds: dict[str, Gold] | None = None,
        on_evaluation: Callable[["Run", Sequence[Evaluation], Sequence[Image.Image]], None] | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        shared = set(prompts) & set(held_out)
        if not prompts or len(held_out) < 2:
            raise InvalidInputError(
                f"{len(prompts)} prompts and {len(held_out)} held out: need at least 1 and 2"
            )
        if shared:
            raise InvalidInputError(f"{len(shared)} held-out prompts are trained on, such as {min(shared)!r}")
        self.config, self.policy, self.reward = config, policy, reward
        self.prompts, self.held_out = list(prompts), list(held_out)
        self.golds = golds or {}
        self.on_evaluation, self.log = on_evaluation, log
        self.processes = Processes(cpu=config.cpu)
        if config.batch_size % self.processes.count:
            raise InvalidInputError(
                f"batch_size = {config.batch_size} does not divide over {self.processes.count} processes"
            )
        digest = hashlib.blake2b(json.dumps([self.prompts, self.held_out]).encode(), digest_size=16)
        self.state = RunState(
            config,
            policy.parameters(),
            adamw(policy.network, config.optimizer),
            fingerprint=digest.hexdigest(),
            data="prompts",
            unit="update",
            may_change=_MAY_CHANGE,
        )
        self.output = self.state.output
        self.evaluations: list[Evaluation] = []
        self.history: list[Measures] = []
        if self._writes:
            assert self.output is not None
            for name in ("last", "best"):
                recover_folder(self.output / name)
            self.output.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------- the loop

    def train(self, update: Update) -> RunResult:
        """Updates until the last one, or until the reward is over-optimised, where that stops the run.

        Raises:
            AlignmentError: a gradient that is not finite or above `gradient_limit`, or another process has
                failed.
            RewardError: a reward that is not finite.
            Interrupted: SIGINT or SIGTERM; the update in progress was finished and saved.
            OSError: a checkpoint or a log cannot be written; it names the path.
        """
        try:
            return self._train(update)
        except Exception:
            self.processes.leave()
            raise

    def _train(self, update: Update) -> RunResult:
        config = self.config
        self.state.start()
        self.processes.wait()  # the main one may have had a folder to recover
        if config.resume:
            self._resume()
        if self._writes:
            assert self.output is not None
            self._truncate_logs()
            atomic_write(self.output / "align_config.json", json.dumps(json_types(config), indent=2).encode())
        with warnings.catch_warnings():
            # Under autocast the head's RMSNorm meets bfloat16 tokens with a float32 scale, as intended.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            with Interrupt() as interrupt:
                stopped_by = self._loop(update, interrupt)
        if self.state.average is not None:
            self.state.average.copy_to(self.state.shards())
        if self._writes:
            assert self.output is not None
            with naming(self.output):
                self.policy.save_lora(self.output)
        self.processes.wait()
        return RunResult(
            steps=self.state.step,
            seconds=self.state.seconds,
            stopped_by=stopped_by,
            evaluations=tuple(self.evaluations),
            history=tuple(self.history),
        )

    def _loop(self, update: Update, interrupt: Interrupt) -> str:
        """Evaluations, updates and checkpoints; returns what ended it."""
        config, state = self.config, self.state
        every, total = config.monitor.every, config.num_steps
        due = state.step % every == 0 or state.step == total
        if (
            due
            and all(earlier.step != state.step for earlier in self.evaluations)
            and self._evaluation_stops()
        ):
            return "overoptimisation"
        while state.step < total:
            state.set_learning_rate()
            measures = self._over_processes(update(self, state.step))
            state.step += 1
            self._tell(measures | {"step": state.step, "seconds": round(state.seconds, 3)})
            due = state.step % every == 0 or state.step == total
            asked = self.processes.asked(interrupt)
            if due or asked or state.step % config.checkpoint_every == 0:
                self.checkpoint("last")
            if not asked and due and self._evaluation_stops():
                return "overoptimisation"
            if asked or (due and self.processes.asked(interrupt)):
                raise Interrupted(interrupt.number, state.kept())
        return "steps"

    def _over_processes(self, measures: Measures) -> Measures:
        """Means over all processes: each has measured its own share."""
        values = self.processes.gather(torch.tensor(list(measures.values()), dtype=torch.float64)).mean(dim=0)
        return dict(zip(measures, values.tolist(), strict=True))

    @property
    def _writes(self) -> bool:
        """Whether this process writes into the folder of the run."""
        return self.output is not None and self.processes.is_main

    # ------------------------------------------------------------------------------------- for algorithms

    def draw(self, step: int, *, per_prompt: int = 1) -> tuple[list[str], list[int]]:
        """Prompts and seeds of an update, of this process: each prompt `per_prompt` times in a row.

        Process p of P has the places p, p + P, ... of the batch.
        """
        generator = torch.Generator().manual_seed(mix_seeds(self.config.seed, Stream.PROMPTS, step))
        count, size = len(self.prompts), self.config.batch_size
        rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
        chosen = torch.cat(rounds)[:size].tolist()
        prompts, seeds = [], []
        for place in range(self.processes.index, size, self.processes.count):
            for copy in range(per_prompt):
                prompts.append(self.prompts[chosen[place]])
                seeds.append(mix_seeds(self.config.seed, Stream.SAMPLES, step, place, copy))
        return prompts, seeds

    def rollout(
        self, prompts: Sequence[str], seeds: Sequence[int], *, step_seeds: Sequence[int] | None = None
    ) -> Trajectory:
        """Stochastic sampling with the weights as they are, with a record of all steps."""
        conditioning = self.policy.encode(prompts)
        with self.policy.precision(self.config.precision):
            return rollout(self.policy, conditioning, seeds, self.config.sampler, step_seeds=step_seeds)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Clean latents, sampled without noise with the weights as they are."""
        conditioning = self.policy.encode(prompts)
        with self.policy.precision(self.config.precision):
            return sample(self.policy, conditioning, seeds, self.config.sampler)

    @torch.no_grad()
    def score(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Finite rewards without gradient, (batch,), batch by batch, in the precision of the reward."""
        size = self.config.sampler.batch_size
        parts = []
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            with self.policy.precision(self.config.precision):
                found = self.reward(latents[rows], prompts[rows], seeds[rows])
            parts.append(checked(found, prompts[rows]))
        return torch.cat(parts)

    def chunks(self, count: int) -> Iterator[slice]:
        """Rows in parts that a pass with gradients can hold."""
        size = self.config.max_loss_rows
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part of a batch; `loss` is its share of the mean over this process's rows,
        or, where processes have unequal numbers of rows, over their average number."""
        loss.backward()

    def learn(self) -> float:
        """One optimizer step on what was added, in all processes; returns the gradient's norm, not clipped.

        Raises:
            AlignmentError: the norm is not finite or above `gradient_limit`; nothing was changed.
        """
        parameters = list(self.state.parameters.values())
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        # All of them in one collective: a latency for each would cost more than the numbers.
        together = self.processes.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = together.split([one.numel() for one in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_gradient_norm))
        if not norm <= self.config.gradient_limit:  # also false for NaN
            self.state.optimizer.zero_grad(set_to_none=True)
            where = "none was written yet" if self.output is None else f"it is in {self.output / 'last'}"
            raise AlignmentError(
                f"the gradient's norm is {norm:.3g} in update {self.state.step}, allowed up to "
                f"gradient_limit = {self.config.gradient_limit:g}: lower optimizer.learning_rate or the "
                f"reward's weight. The "
                f"last good checkpoint is unchanged: {where}"
            )
        self.state.optimize()
        return norm

    # ------------------------------------------------------------------------------------- evaluation

    def _evaluation_stops(self) -> bool:
        """Evaluate; whether the run ends with it."""
        overoptimised = self._evaluate().overoptimised
        return overoptimised is not None and self.config.monitor.on_overoptimisation == "stop"

    @torch.no_grad()
    def _evaluate(self) -> Evaluation:
        config, size = self.config, self.config.monitor.grid_size
        shown = self.held_out[:size]
        seeds = [mix_seeds(config.seed, Stream.EVALUATION, index) for index in range(len(self.held_out))]
        more = [
            mix_seeds(config.seed, Stream.DIVERSITY, i, j)
            for i in range(len(shown))
            for j in range(DIVERSITY_SAMPLES)
        ]
        with self.state.averaged():
            clean = self.sample(self.held_out, seeds)
            several = self.sample([one for one in shown for _ in range(DIVERSITY_SAMPLES)], more)
            distance = self.policy.distance()
        proxy = self.score(clean, self.held_out, seeds).float()

        def judged() -> Evaluation:
            """By one process: a gold score that answers one and fails another must not part their ways."""
            pictures = self.policy.pictures(clean, batch_size=config.sampler.batch_size)
            gold, missing = ask_all(self.golds, self.held_out, pictures)
            evaluation = Evaluation(
                step=self.state.step,
                seconds=round(self.state.seconds, 3),
                proxy=tuple(proxy.tolist()),
                gold=gold,
                missing=missing,
                distance=distance,
                diversity=diversity(several.unflatten(0, (len(shown), DIVERSITY_SAMPLES))),
            )
            overoptimised = overoptimisation(
                [*self.evaluations, evaluation],
                window=config.monitor.window,
                planned=len({*range(0, config.num_steps, config.monitor.every), config.num_steps}),
            )
            evaluation = replace(evaluation, overoptimised=overoptimised)
            self._keep(evaluation, pictures[: len(shown)])
            return evaluation

        evaluation = self.processes.from_main(judged)
        if not self.processes.is_main:
            self.evaluations.append(evaluation)
        return evaluation

    def _keep(self, evaluation: Evaluation, pictures: Sequence[Image.Image]) -> None:
        """Write an evaluation down, and the weights if gold was never better.

        The line in evaluations.jsonl says that all of it was done, so it comes after pictures and weights.
        """
        self.evaluations.append(evaluation)
        for name, reason in evaluation.missing.items():
            self.log(
                f"update {self.state.step}: the gold score {name} is missing, the run goes on without: "
                f"{reason}"
            )
        if evaluation.overoptimised is not None:
            self.log(f"update {self.state.step}: the reward is over-optimised: {evaluation.overoptimised}")
        if self.output is None:
            return
        folder = self.output / "pictures" / f"{self.state.step:06d}"
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for index, picture in enumerate(pictures):
                picture.save(folder / f"{index:03d}.png")
        if best_evaluation(self.evaluations) is evaluation and self.state.step > 0:
            with self.state.averaged(), atomic_folder(self.output / "best") as best:
                self.policy.save_lora(best)
        append_line(self.output / "evaluations.jsonl", asdict(evaluation))
        if self.on_evaluation is not None:
            self.on_evaluation(self, self.evaluations, pictures)

    # ------------------------------------------------------------------------------------- on disk

    def _tell(self, measures: Measures) -> None:
        self.history.append(measures)
        if self._writes:
            assert self.output is not None
            append_line(self.output / "metrics.jsonl", measures)

    def checkpoint(self, name: str) -> None:
        """OUTPUT/NAME: the average weights as a LoRA file, and all that a resumed run needs."""
        if not self._writes:
            return
        assert self.output is not None
        best = best_evaluation(self.evaluations)
        if best is not None:
            self.state.best_accuracy, self.state.best_step = best.mean_gold, best.step
        with atomic_folder(self.output / name) as folder:
            with self.state.averaged():
                self.policy.save_lora(folder)
            self.state.save(folder)

    def _resume(self) -> None:
        if self.state.resume():
            assert self.output is not None
            for record in lines_until(self.output / "evaluations.jsonl", self.state.step):
                gold = {
                    name: None if values is None else tuple(values)
                    for name, values in record.pop("gold").items()
                }
                self.evaluations.append(Evaluation(gold=gold, proxy=tuple(record.pop("proxy")), **record))
        steps = self.processes.gather(torch.tensor([self.state.step, len(self.evaluations)]))
        if bool((steps != steps[0]).any()):
            raise InvalidInputError(
                f"{self.output} is at update {' and '.join(map(str, steps[:, 0].tolist()))} as the "
                f"processes see it: output must be one folder, which all of them read"
            )

    def _truncate_logs(self) -> None:
        """Lines of an earlier attempt that go beyond the checkpoint are taken back."""
        assert self.output is not None
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            file = self.output / name
            kept = lines_until(file, self.state.step) if self.state.step and file.exists() else []
            if file.exists():
                atomic_write(file, "".join(json.dumps(one) + "\n" for one in kept).encode())
            if name == "metrics.jsonl":
                self.history = kept


_MAY_CHANGE = frozenset(
    "num_steps output resume checkpoint_every cpu monitor max_loss_rows gradient_limit".split()
)
