"""SimpleNet's training: rounds of passes over good features, the optimisers, checkpoints to go on from."""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kizu.config import SimpleNetConfig
from kizu.data import files
from kizu.detectors.simplenet.networks import Discriminator, Projection, judge, noise
from kizu.errors import ModelError

__all__ = ["DIVISION", "ORDER", "Networks", "Training", "generator"]

log = logging.getLogger("kizu")
LOWEST = 0.4  # of the learning rate, at the end of the cosine
WEIGHT_DECAY = 1e-5  # of the discriminator
NOISE, CHECK, ORDER, DIVISION = range(4)  # what is random
CHECKED = 1 << 14  # rows that a round is judged by


class Networks(Protocol):
    """What is trained."""

    projection: Projection
    discriminator: Discriminator

    @property
    def backbone(self) -> nn.Module: ...

    def adapt(self, rows: Tensor) -> Tensor:
        """Features (N, D) in units of their deviation, projected (N, E)."""
        ...


class Training:
    """Teaches a graph's projection and discriminator, and its backbone where the config says so.

    Everything random is drawn anew in each pass from the seed and the pass's number, so that training which goes on
    from a checkpoint does what uninterrupted training would have done.
    """

    def __init__(self, graph: Networks, config: SimpleNetConfig, device: torch.device) -> None:
        self.graph, self.config, self.device = graph, config, device
        self.modules: dict[str, nn.Module] = {"discriminator": graph.discriminator, "pre_projection": graph.projection}
        if config.train_backbone:
            self.modules["backbone"] = graph.backbone.requires_grad_(True)
        self.optimisers = self._optimisers()
        self.history: list[dict[str, float]] = []  # of each round
        self.best: dict[str, Any] | None = None  # the states of the best round so far, where one is selected

    def run(
        self,
        passes: Callable[[int], Iterable[Tensor]],
        checked: Tensor | None,
        *,
        checkpoint: Path | None,
        key: str,
        progress: Callable[[str, int, int], None],
        after_round: Callable[[int], None],
    ) -> None:
        """All rounds. `passes(number)` gives the rows (N, D) of each step; `checked` (M, D) selects, if it is there.

        `key` says what is trained on what: a checkpoint with another one is refused with a `ModelError`.
        """
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint, key)
        rounds = self.config.meta_epochs
        while len(self.history) < rounds and not self._has_stalled():
            facts = self._round(passes)
            if checked is not None:
                facts["held_out_loss"] = self._loss(checked)
            self.history.append(facts)
            self._remember_best()
            words = ", ".join(f"{name} {value:.3f}" for name, value in facts.items())
            log.info("round %d: %s", len(self.history), words)
            if checkpoint is not None:
                self._save(checkpoint, key)
            after_round(len(self.history))
            progress(f"Training: {words}", len(self.history), rounds)
        if self.best is not None:
            for name, module in self.modules.items():
                module.load_state_dict(self.best["states"][name])
        for module in self.modules.values():
            module.eval().requires_grad_(False)

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
                good = self.graph.adapt(rows)
                noisy = good + noise(good, self.config.noise_std, self.config.mix_noise, random)
                judged = judge(self.graph.discriminator, good, noisy, self.config.dsc_margin)
                for optimiser in self.optimisers.values():
                    optimiser.zero_grad(set_to_none=True)
                judged.loss.backward()
                for optimiser in self.optimisers.values():
                    optimiser.step()
                steps.append(torch.stack(judged).detach())
        return dict(zip(("loss", "p_true", "p_fake"), torch.stack(steps).mean(0).tolist(), strict=True))

    @torch.no_grad()
    def _loss(self, checked: Tensor) -> float:
        """Of good features held out (M, D) and noisy copies of them, the same ones after every round."""
        self.graph.projection.eval()
        self.graph.discriminator.eval()
        random = generator(self.config.seed, CHECK, device=self.device)
        good = self.graph.adapt(checked[:: max(1, len(checked) // CHECKED)])
        noisy = good + noise(good, self.config.noise_std, self.config.mix_noise, random)
        return float(judge(self.graph.discriminator, good, noisy, self.config.dsc_margin).loss)

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
        made: dict[str, torch.optim.Optimizer] = {
            "discriminator": torch.optim.Adam(
                self.graph.discriminator.parameters(), lr=config.dsc_lr, weight_decay=WEIGHT_DECAY
            )
        }
        if config.pre_proj:
            made["pre_projection"] = torch.optim.AdamW(self.graph.projection.parameters(), lr=config.proj_lr)
        if config.train_backbone:
            made["backbone"] = torch.optim.AdamW(self.graph.backbone.parameters(), lr=config.backbone_lr)
        return made

    def _set_rate(self, number: int) -> None:
        """The discriminator's rate in a pass: along a cosine to `LOWEST`, where it stays."""
        if not self.config.cos_lr:
            return
        total = (self.config.meta_epochs - self.config.aed_meta_epochs) * self.config.gan_epochs
        share = (1 + math.cos(math.pi * min(number / total, 1))) / 2
        for group in self.optimisers["discriminator"].param_groups:
            group["lr"] = self.config.dsc_lr * (LOWEST + (1 - LOWEST) * share)

    def _save(self, path: Path, key: str) -> None:
        content = {
            "key": key,
            "history": self.history,
            "best": self.best,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
        }
        with files.new_file(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    def _resume(self, path: Path, key: str) -> None:
        try:
            content = torch.load(path, map_location=self.device, weights_only=True)
            if content["key"] != key:
                raise ModelError(f"{path} is a checkpoint of other images or settings: remove it to start anew")
            for name, module in self.modules.items():
                module.load_state_dict(content["modules"][name])
            for name, optimiser in self.optimisers.items():
                optimiser.load_state_dict(content["optimisers"][name])
            self.history, self.best = content["history"], content["best"]
        except ModelError:
            raise
        except Exception as error:  # a broken file raises anything
            raise ModelError(f"{path}: the checkpoint is damaged ({type(error).__name__}): remove it") from None


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The same for the same numbers, and independent of all others."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))
