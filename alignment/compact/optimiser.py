"""Step AdamW on a one-cycle schedule, average the weights, and save the state between epochs.

Place in the flow: used by every stage of `recipe`.
"""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alignment.atomic import atomic_write

logger = logging.getLogger(__name__)

Groups: TypeAlias = Sequence[tuple[list[nn.Parameter], float]]
"""Parameters with their peak learning rates."""


class Optimiser:
    """AdamW on a one-cycle schedule, with a running average of the weights."""

    def __init__(self, module: nn.Module, groups: Groups, steps: int, weight_decay: float, average: float) -> None:
        """Prepare to train; `average` is the decay of the running average.

        The module's `logit_scale`, if it has one, is trained at the first rate and without weight decay.
        """
        self.module = module
        parameters = [{"params": tuned, "weight_decay": weight_decay} for tuned, _ in groups]
        rates = [rate for _, rate in groups]
        if hasattr(module, "logit_scale"):
            parameters.append({"params": [module.logit_scale], "weight_decay": 0.0})
            rates.append(rates[0])
        self.adam = torch.optim.AdamW(parameters, lr=rates[0])
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.adam, rates, steps, pct_start=0.1)
        self.tuned = [weight for group in self.adam.param_groups for weight in group["params"]]
        self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(average))
        self.count, self.started = 0, time.monotonic()
        module.train()

    def step(self, loss: Tensor) -> None:
        """Take one step; a loss that is not finite ends the run."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss.item()} at step {self.count}: lower the learning rates.")
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.tuned, 2.0)
        self.adam.step()
        self.schedule.step()
        self.average.update_parameters(self.module)
        self.count += 1
        if self.count % 20 == 0:
            logger.info("step %d, loss %.3f, %.0f s", self.count, loss.item(), time.monotonic() - self.started)

    def save(self, path: Path) -> None:
        """Write weights, averages and moments, so that `load` goes on from here."""
        state = {f"weight.{name}": value for name, value in self.module.state_dict().items()}
        state |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, moments in self.adam.state_dict()["state"].items():
            state |= {f"adam.{number}.{name}": value for name, value in moments.items()}
        with atomic_write(path) as fresh:
            save_file({name: value.contiguous() for name, value in state.items()}, fresh, {"count": str(self.count)})

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a method
            self.count = int(file.metadata()["count"])
        self.module.load_state_dict(_part(state, "weight."))
        self.average.load_state_dict(_part(state, "average."))
        adam = self.adam.state_dict()
        for name, value in _part(state, "adam.").items():
            number, moment = name.split(".")
            adam["state"].setdefault(int(number), {})[moment] = value
        self.adam.load_state_dict(adam)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule steps here without the optimiser
            for _ in range(self.count):
                self.schedule.step()

    def keep_average(self) -> None:
        """Put the averaged weights in place of the last ones."""
        self.module.load_state_dict(self.average.module.state_dict())
        self.module.eval()


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
