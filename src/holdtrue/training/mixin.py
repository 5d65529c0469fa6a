"""Defenses inside a ``transformers`` training loop: the part that Trainer subclasses share."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from holdtrue.data.batching import each_of_kind
from holdtrue.data.chat import KINDS
from holdtrue.defenses import Defense, GradientContext, LossDefense, Needs, PairGradient, PairTerm
from holdtrue.errors import NeedError, OutcomeError
from holdtrue.models import causal_lm, decoder_blocks
from holdtrue.models.layers import peft_model
from holdtrue.scoring import final_hidden, output_head, scoring_mode
from holdtrue.training.aside import Aside, rows_aside
from holdtrue.training.batch import COUNTS, Batch, draw_lots
from holdtrue.training.fast_lora import fast_lora
from holdtrue.training.features import feature_term
from holdtrue.training.metrics import mean, step_means
from holdtrue.training.objective import Positions, TokenResult, TokenTerm, token_objective
from holdtrue.training.pairs import Pairs, rows_in_pairs
from holdtrue.training.reference import Reference, ReferenceOutputs, captured_outputs, shared_start
from holdtrue.training.runtimes import Probe, RuntimeMixin

if TYPE_CHECKING:
    from holdtrue.training.reference_cache import ReferenceCache


logger = logging.getLogger(__name__)

_STARTS = 64
"""Rows that are looked at for the start that all share."""


@dataclass
class MicroStep:
    """What one forward pass of the policy is told, and the sums that it gives back.

    Attributes:
        batch: the rows.
        wanted: (batch, length) bool, where ``reference`` holds final states.
        chosen: (batch, length) bool, the positions that reach the output head; ``wanted`` is among them.
        reference: what the frozen model said, or ``None``.
        counts: what each term covers in the whole window.
        sums: filled by the pass.
    """

    batch: Batch
    wanted: Tensor
    chosen: Tensor
    reference: ReferenceOutputs | None
    counts: dict[str, float]
    sums: dict[str, Tensor] = field(default_factory=dict)


class DefenseMixin(RuntimeMixin):
    """Adds ``defenses`` to a Trainer; put it before the Trainer among the bases.

    The objective is computed inside the wrapped model's forward, so that DDP and FSDP synchronize as they always do.
    Each term is divided by the count of what it covers over the whole accumulation window and all ranks.

    Args:
        defenses: values, names or mappings as in a spec, in any order.
        kl_every: optimizer steps between measurements of the KL to the reference where no defense pays for one.
        reference_cache: where the reference's states are kept for later epochs and for other runs on the same rows.
        probe: measures the policy for defenses that ask for it, such as ``holdtrue.evaluation.MarginProbe``.
        fast: ``False`` turns the fast paths off, those whose results differ from the plain ones by rounding alone.

    Raises:
        NeedError: the model has no LoRA adapter, or its output head is trainable; or there is no row of a kind that a
            defense holds.
        RunError: the model computes its logits in a way that is not known; or, while training, it diverged
            (``OutcomeError``).
    """

    def __init__(
        self,
        *args: Any,
        defenses: Sequence[Any] = (),
        kl_every: int = 0,
        reference_cache: ReferenceCache | None = None,
        probe: Probe | None = None,
        fast: bool = True,
        **kwargs: Any,
    ) -> None:
        from holdtrue.defenses import parse

        self.defenses: tuple[Defense, ...] = parse(defenses)
        self.kl_every, self.fast = kl_every, fast
        self._active = [d for d in self.defenses if not (isinstance(d, LossDefense) and d.weight == 0)]
        self._losses = [(d, d.needs()) for d in self._active if isinstance(d, LossDefense)]
        super().__init__(*args, **kwargs)
        self._take_one_gpu()
        self.loss_is_scaled_for_ga = True
        self.args.logging_nan_inf_filter = False
        self._check_model()
        self._check_rows()
        count = len(decoder_blocks(self._policy))
        live = [n.blocks(count) for _, n in self._losses if n.blocks is not None and not n.prefix]
        blocks = sorted({index for indices in live for index in indices})
        self._reference = Reference(self._policy, blocks, cache=reference_cache, start=self._shared_start())
        self._features = {
            d.name: feature_term(d.name, n, self._policy, self._reference, self.processing_class, self.train_dataset)
            for d, n in self._losses
            if n.features
        }
        self._captured = {place: m for term in self._features.values() for place, m in term.modules.items()}
        self._aside = self._kept_aside()
        self._pairs = self._kept_pairs(reference_cache)
        self._window: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._window_started = 0.0
        self.step_metrics: dict[str, float] = {}
        self._start_runtimes(self._active, [defense for defense, _ in self._losses], probe)

    # What a run may do

    def _check_model(self) -> None:
        if self.model is None or peft_model(self.model) is None:
            raise NeedError(
                "full fine-tuning is not supported: the reference is the model with its adapter off, so give a "
                "PeftModel with a LoRA adapter"
            )
        embeddings = causal_lm(self._policy).get_output_embeddings()
        if embeddings is None or any(p.requires_grad for p in embeddings.parameters()):
            raise NeedError("the output head is trainable: take it out of the adapter's target modules")
        acting = [defense.name for defense in self._active if type(defense).gradient is not Defense.gradient]
        if self.args.fp16 and acting:
            raise NeedError(
                f"{' and '.join(acting)} changes gradients, which fp16 has scaled when it sees them: train in bf16, or "
                "in the model's own number format"
            )
        with scoring_mode(self._policy) as lm:
            self._head = output_head(lm)
            self._vocabulary = lm.config.get_text_config().vocab_size

    def _check_rows(self) -> None:
        rows: Any = self.train_dataset
        if not hasattr(rows, "__len__"):
            return  # none, or a stream, of which nobody knows what comes
        for defense, needs in self._losses:
            for kind in needs.requires:
                if not any(self._covers(row, needs) for row in each_of_kind(rows, KINDS[kind])):
                    raise NeedError(
                        f"{defense.name} holds rows of kind {kind!r}, and no training row of that kind has a token "
                        f"that it covers ({needs.tokens}): a run prepares them; a trainer of your own is given them; "
                        "where answers lie beyond training.max_length, raise that"
                    )

    def _covers(self, row: dict[str, Any], needs: Needs) -> bool:
        return bool(Batch.of(self.data_collator([row])).covered(needs, sampled=False).any())

    def _shared_start(self) -> tuple[int, ...]:
        """Return the tokens with which the training rows begin, as some of them tell."""
        rows: Any = self.train_dataset
        if not self.fast or rows is None or not hasattr(rows, "__len__") or not len(rows):
            return ()
        chosen = [rows[i] for i in range(0, len(rows), max(1, len(rows) // _STARTS))]
        task = [row for row in chosen if row.get("kind", 0) == 0]
        return shared_start([list(row["input_ids"]) for row in task if "input_ids" in row])

    def _kept_aside(self) -> Aside | None:
        rows = rows_aside(self._active, self.train_dataset)
        if not rows:
            return None
        size = self.args.per_device_train_batch_size
        more: dict[str, Any] = {"size": size, "accelerator": self.accelerator, "fast": self.fast}
        return Aside(rows, self._policy, self._reference, self._token_objective, **more)

    def _take_one_gpu(self) -> None:
        found = self.args.n_gpu
        if found > 1:
            # nn.DataParallel would run copies of the model, whose forward is not the objective.
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
            logger.warning(
                "%d GPUs are here, and one process trains on one of them; to train on all, start it with "
                "torchrun --nproc-per-node %d",
                found,
                found,
            )

    def _kept_pairs(self, cache: ReferenceCache | None) -> Pairs | None:
        rows = rows_in_pairs(self._active, self.train_dataset)
        more: dict[str, Any] = {"accelerator": self.accelerator, "fast": self.fast, "cache": cache}
        return Pairs(rows, self._policy, self._token_objective, **more) if rows else None

    def _pair_gradient(self, chosen: Sequence[int], term: PairTerm) -> PairGradient:
        assert self._pairs is not None
        return self._pairs.gradient(chosen, term, self._trainable(), self.compute_loss_context_manager)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._policy.named_parameters() if p.requires_grad}

    def _over_ranks(self, values: Tensor) -> list[float]:
        total = self.accelerator.reduce(values, reduction="sum")
        assert isinstance(total, Tensor)
        return total.tolist()

    # The accumulation window

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Draw the window's micro-batches and count, over all ranks, what each term covers."""
        self._window_started = time.perf_counter()
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if any(needs.sample < 1 for _, needs in self._losses):
            ranks = {"gather": gather_object, "process": self.args.process_index}
            draw_lots(batches, self.args.seed, self.state.global_step, **ranks)
        terms = [(defense.name, needs) for defense, needs in self._losses if needs.tokens is not None]
        names = [*COUNTS, *(f"defense/{name}" for name, _ in terms), *(f"features/{name}" for name in self._features)]
        totals = torch.zeros(len(names), dtype=torch.float64)
        for each in map(Batch.of, batches):
            covered = [each.covered(needs, sampled=False).sum().double().cpu() for _, needs in terms]
            covered += [term.covered(each).sum().double().cpu() for term in self._features.values()]
            totals += torch.cat([each.counts().cpu(), torch.tensor(covered, dtype=torch.float64)])
        self._counts = dict(zip(names, self._over_ranks(totals.to(device)), strict=True))
        self._window = {}
        self._strengths = self._weights([defense for defense, _ in self._losses])
        return batches, self._counts["trained"]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward; after the window's last, the gradient hooks and the metrics."""
        inputs = self._prepare_inputs(inputs)
        batch = Batch.of(inputs)
        wanted = self._wanted(batch)
        blocks = any(needs.live and needs.blocks is not None and not needs.prefix for _, needs in self._losses)
        # Asked for on every rank alike, also where this one has no row that is drawn, since ranks add up their sums.
        asked = self._measured() or any(needs.live for _, needs in self._losses)
        outputs = self._reference.outputs(batch, wanted, blocks=blocks) if asked else None
        step = MicroStep(batch, wanted, self._chosen(batch, wanted), outputs, self._counts)
        with contextlib.ExitStack() as stack:
            stack.enter_context(fast_lora(self._policy, on=self.fast))
            for defense in self._active:
                stack.enter_context(defense.forward(model))
            loss = super().training_step(model, {"holdtrue_step": step}, num_items_in_batch)
        for name, value in step.sums.items():
            self._window[name] = self._window[name] + value if name in self._window else value
        if self.accelerator.sync_gradients:
            self._finish_window()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Call the wrapped model, whose forward computes the objective of the micro-batch."""
        if "holdtrue_step" not in inputs:  # an evaluation of the Trainer below
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step: MicroStep = inputs["holdtrue_step"]
        with self._objective_forward():
            outputs = model(input_ids=self._read(step), holdtrue_step=step)
        # DDP averages gradients over ranks; the counts are sums over ranks.
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _finish_window(self) -> None:
        parameters = self._trainable()
        aside = None if self._aside is None else self._aside_gradient
        pairs = {} if self._pairs is None else {"pairs": len(self._pairs), "pair_gradient": self._pair_gradient}
        context = GradientContext(parameters, self.state.global_step, aside, **pairs)
        for defense in self._active:
            defense.gradient(context)
        names = sorted(self._window)
        values = torch.stack([self._window[n].double() for n in names])
        sums = dict(zip(names, self._over_ranks(values), strict=True))
        seconds = time.perf_counter() - self._window_started
        self.step_metrics = step_means(sums, self._counts, self._losses, self._strengths, seconds)
        if self._runtimes:
            self.step_metrics |= {f"{name}_weight": weight for name, weight in self._strengths.items()}
        self.step_metrics |= context.metrics
        if not all(map(math.isfinite, self.step_metrics.values())):
            bad = [n for n, v in self.step_metrics.items() if not math.isfinite(v)]
            raise OutcomeError(
                f"training diverged at step {self.state.global_step + 1}: {', '.join(bad)} is not finite. "
                "Lower the learning rate or the weights, or look for broken rows"
            )

    # The objective of one micro-batch

    def _measured(self) -> bool:
        """Return whether this step measures the KL to the reference, whoever pays for it."""
        return self.kl_every > 0 and self.state.global_step % self.kl_every == 0

    def _wanted(self, batch: Batch) -> Tensor:
        """Return where the reference's final states are read, (batch, length) bool."""
        wanted = batch.response if self._measured() else torch.zeros_like(batch.mask)
        for _, needs in self._losses:
            if needs.tokens is not None and needs.reference:
                wanted = wanted | batch.covered(needs)
        return wanted

    def _chosen(self, batch: Batch, wanted: Tensor) -> Tensor:
        """Return the positions that reach the output head, (batch, length) bool."""
        chosen = batch.trained | wanted
        for _, needs in self._losses:
            if needs.tokens is not None:
                chosen = chosen | batch.covered(needs)
        return chosen

    def _read(self, step: MicroStep) -> Tensor:
        """Return the tokens that the policy reads: none behind the last position that anybody asks for."""
        ids, prefixes = step.batch.input_ids, [term.prefix for term in self._features.values()]
        if None in prefixes or not self.fast:
            return ids
        columns = step.chosen.any(0).nonzero()
        last = int(columns.max()) if len(columns) else 0
        return ids[:, : max([last + 1, *(len(prefix) for prefix in prefixes if prefix)])]

    @contextlib.contextmanager
    def _objective_forward(self) -> Iterator[None]:
        lm = causal_lm(self._policy)

        def forward(*_: Any, input_ids: Tensor, holdtrue_step: MicroStep, **__: Any) -> dict[str, Tensor]:
            return {"loss": self._objective(lm, input_ids, holdtrue_step)}

        before = vars(lm).get("forward")
        lm.forward = forward
        try:
            yield
        finally:
            if before is None:
                del lm.forward
            else:
                lm.forward = before

    def _objective(self, lm: Any, input_ids: Tensor, step: MicroStep) -> Tensor:
        batch, reference, counts = step.batch, step.reference, step.counts
        with captured_outputs(self._captured) as captured:
            hidden = final_hidden(lm, input_ids)
        positions = batch.positions(step.chosen)
        referenced = step.wanted[positions.row, positions.column]
        positions = positions.take(torch.cat([referenced.nonzero(), (~referenced).nonzero()]).squeeze(-1))
        terms = [
            TokenTerm(
                defense.name,
                batch.covered(needs)[positions.row, positions.column],
                _coefficient(self._strengths[defense.name], counts[f"defense/{defense.name}"] * needs.sample),
                defense.token_term,
                needs.reference,
            )
            for defense, needs in self._losses
            if needs.tokens is not None
        ]
        loss, sums = self._token_objective(
            hidden,
            positions,
            ce_coefficient=_coefficient(1.0, counts["trained"]),
            terms=terms,
            reference_hidden=None if reference is None else reference.hidden,
        )
        step.sums.update(sums)
        for defense, _ in ((d, n) for d, n in self._losses if n.features):
            coefficient = _coefficient(self._strengths[defense.name], counts[f"features/{defense.name}"])
            with torch.set_grad_enabled(torch.is_grad_enabled() and coefficient != 0):
                total = self._features[defense.name].total(defense.feature_term, batch, captured, reference)
            step.sums[f"features/{defense.name}"] = total.detach()
            loss = loss + coefficient * total if coefficient else loss
        # Ties the loss to every adapter weight also where nothing is covered, or DDP would wait for gradients.
        return loss + 0.0 * hidden.sum()

    def _token_objective(self, hidden: Tensor, positions: Positions, **more: Any) -> TokenResult:
        at = hidden[positions.row, positions.column]
        return token_objective(at, self._head, positions, vocabulary=self._vocabulary, fast=self.fast, **more)

    def _aside_gradient(self) -> dict[str, Tensor]:
        assert self._aside is not None
        return self._aside.gradient(self._trainable(), self.compute_loss_context_manager)

    # Measuring and logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the step's metrics beside the Trainer's own."""
        if "loss" in logs:
            logs = logs | self.step_metrics
        super().log(logs, start_time)

    def validation_metrics(self, batches: Any) -> dict[str, float]:
        """Return ``ce`` and ``kl`` to the reference, nats per response token, and ``accuracy``, over all ranks."""
        model = self._policy
        lm, training = causal_lm(model), model.training
        totals = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        model.eval()
        try:
            with torch.no_grad():
                for inputs in batches:
                    batch = Batch.of(self._prepare_inputs(inputs))
                    positions = batch.positions(batch.response)
                    hidden = final_hidden(lm, batch.input_ids)
                    reference = self._reference.outputs(batch, batch.response).hidden
                    _, sums = self._token_objective(hidden, positions, ce_coefficient=0.0, reference_hidden=reference)
                    zero = totals.new_zeros(())
                    counts = batch.counts()
                    found = [sums["ce"], sums["right"], counts[1].to(zero), sums.get("kl", zero), counts[3].to(zero)]
                    totals += torch.stack(found).double()
        finally:
            model.train(training)
        ce, right, trained, kl, response = self._over_ranks(totals)
        means = {"ce": mean(ce, trained), "accuracy": mean(right, trained), "kl": mean(kl, response)}
        return means | {"target_tokens": trained}


def _coefficient(weight: float, count: float) -> float:
    return weight / count if count else 0.0
