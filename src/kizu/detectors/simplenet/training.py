"""SimpleNet's training (§3.5): rounds of passes over good features, the optimisers, which round is kept."""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kizu.config import SimpleNetConfig
from kizu.detectors.fitting import FitContext
from kizu.detectors.simplenet.networks import HingeLoss, SimpleNetGraph, hinge_loss, noise
from kizu.features.training_state import Checkpoint

__all__ = ["DIVISION", "ORDER", "Training", "generator"]

log = logging.getLogger("kizu")
LOWEST_RATE = 0.4  # of the learning rate, at the end of the cosine
WEIGHT_DECAY = 1e-5  # of the discriminator
NOISE, CHECK, ORDER, DIVISION = range(4)  # what is random
CHECKED_ROWS = 1 << 14  # that a round is selected by


class Training:
    """Teaches a graph's projection and discriminator, and its backbone where the config says so.

    Everything random is drawn anew in each pass from the seed and the pass's number, so that training which goes on
    from a checkpoint does what uninterrupted training would have done.
    """

    def __init__(self, graph: SimpleNetGraph, config: SimpleNetConfig, device: torch.device) -> None:
        self.graph, self.config, self.device = graph, config, device
        self.modules: dict[str, nn.Module] = {"discriminator": graph.discriminator, "pre_projection": graph.projection}
        if config.train_backbone:
            self.modules["backbone"] = graph.backbone.requires_grad_(True)
        self.optimisers = self._optimisers()
        self.history: list[dict[str, float]] = []  # of each round
        self.best: dict[str, Any] | None = None  # the states of the best round so far, where one is selected

    def run(self, passes: Callable[[int], Iterable[Tensor]], selecting: Tensor | None, context: FitContext) -> None:
        """All rounds. `passes(number)` gives the rows (N, D) of each step; `selecting` (M, D) chooses a round."""
        checkpoint = self._checkpoint(context)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            _, state = checkpoint.restore()
            self.history, self.best = state.get("history", []), state.get("best")
            while len(self.history) < self.config.meta_epochs and not self._has_stalled():
                losses = self._round(passes)
                if selecting is not None:
                    losses["held_out_loss"] = self._held_out_loss(selecting)
                self.history.append(losses)
                self._remember_best()
                checkpoint.write(len(self.history), {"history": self.history, "best": self.best})
                self._report(context)
        if self.best is not None:
            for name, module in self.modules.items():
                module.load_state_dict(self.best["states"][name])
        for module in self.modules.values():
            module.eval().requires_grad_(False)

    def _checkpoint(self, context: FitContext) -> Checkpoint:
        about = {"images": context.photos.hash, "settings": self.config.model_dump_json()}
        optimisers = {f"{name} optimiser": optimiser for name, optimiser in self.optimisers.items()}
        return Checkpoint(context.checkpoint, about, {**self.modules, **optimisers})

    def _report(self, context: FitContext) -> None:
        """Tell of the last round: to the log, to whoever watches the rounds, to the progress bar."""
        number = len(self.history)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self.history[-1].items())
        log.info("round %d: %s", number, losses)
        context.after_round(self.graph.eval(), number)
        context.progress(f"Training: {losses}", number, self.config.meta_epochs)

    def _round(self, passes: Callable[[int], Iterable[Tensor]]) -> dict[str, float]:
        """Means of loss, p_true and p_fake over the steps of a round."""
        self.graph.projection.train()
        self.graph.discriminator.train()
        steps: list[Tensor] = []
        for turn in range(self.config.gan_epochs):
            number = len(self.history) * self.config.gan_epochs + turn
            self._set_rate(number)
            random = generator(self.config.seed, NOISE, number, device=self.device)
            for rows in passes(number):
                outcome = self._loss(rows, random)
                for optimiser in self.optimisers.values():
                    optimiser.zero_grad(set_to_none=True)
                outcome.loss.backward()
                for optimiser in self.optimisers.values():
                    optimiser.step()
                steps.append(torch.stack(outcome).detach())
        return dict(zip(("loss", "p_true", "p_fake"), torch.stack(steps).mean(0).tolist(), strict=True))

    @torch.no_grad()
    def _held_out_loss(self, rows: Tensor) -> float:
        """Of good features held out (M, D) and noisy copies of them, the same ones after every round."""
        self.graph.projection.eval()
        self.graph.discriminator.eval()
        random = generator(self.config.seed, CHECK, device=self.device)
        return float(self._loss(rows[:: max(1, len(rows) // CHECKED_ROWS)], random).loss)

    def _loss(self, rows: Tensor, random: torch.Generator) -> HingeLoss:
        """Of good features (N, D) and a noisy copy of each."""
        good = self.graph.adapt(rows)
        noisy = good + noise(good, self.config.noise_std, self.config.mix_noise, random)
        return hinge_loss(self.graph.discriminator, good, noisy, self.config.dsc_margin)

    def _remember_best(self) -> None:
        """Keep the states of the round with the lowest loss on what is held out."""
        loss = self.history[-1].get("held_out_loss")
        if loss is not None and (self.best is None or loss < self.best["loss"]):
            states = {name: copy.deepcopy(module.state_dict()) for name, module in self.modules.items()}
            self.best = {"round": len(self.history), "loss": loss, "states": states}

    def _has_stalled(self) -> bool:
        patience = self.config.patience
        return self.best is not None and bool(patience) and len(self.history) - self.best["round"] >= patience

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """As in the published code; there the backbone's gradients are never zeroed, here all are."""
        config = self.config
        optimisers: dict[str, torch.optim.Optimizer] = {
            "discriminator": torch.optim.Adam(
                self.graph.discriminator.parameters(), lr=config.dsc_lr, weight_decay=WEIGHT_DECAY
            )
        }
        if config.pre_proj:
            optimisers["pre_projection"] = torch.optim.AdamW(self.graph.projection.parameters(), lr=config.proj_lr)
        if config.train_backbone:
            optimisers["backbone"] = torch.optim.AdamW(self.graph.backbone.parameters(), lr=config.backbone_lr)
        return optimisers

    def _set_rate(self, number: int) -> None:
        """The discriminator's rate in a pass: along a cosine to `LOWEST_RATE`, where it stays."""
        if not self.config.cos_lr:
            return
        total = (self.config.meta_epochs - self.config.aed_meta_epochs) * self.config.gan_epochs
        share = (1 + math.cos(math.pi * min(number / total, 1))) / 2
        for group in self.optimisers["discriminator"].param_groups:
            group["lr"] = self.config.dsc_lr * (LOWEST_RATE + (1 - LOWEST_RATE) * share)


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The same for the same numbers, and independent of all others."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))
