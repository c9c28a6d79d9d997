"""The search for the weights of LoraHub's modules: nevergrad's NGOpt, as its authors use it.

In: a function from N weights to a loss. Out: what NGOpt recommends after a few dozen candidates. Nothing here knows a
model.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_gen_jax.config import HubConfig
from lora_gen_jax.errors import ConfigError

# As many candidates for each module NGOpt searches with COBYLA, which draws no random numbers. With more it chooses
# among methods that fail with NumPy 2.4 (its meta-model) or take their seed from the clock (cma's fmin), in
# nevergrad 1.0.12.
CANDIDATES_PER_MODULE = 50


class Found(NamedTuple):
    """What a search found.

    Attributes:
        weights_N: w.
        objective: what was minimized, there.
    """

    weights_N: np.ndarray
    objective: float


def search(loss_of: Callable[[np.ndarray], float], modules: int, settings: HubConfig, shots: int = 1) -> Found:
    """What NGOpt recommends after `settings.budget` candidates from w = 0 on, for loss / shots + penalty · mean|w|.

    The authors' code divides the mean loss of the tokens by the number of shots once more, and so do we: the penalty
    weighs as much as theirs. The recommendation is the best candidate (COBYLA's, of SciPy 1.16 or newer). The result
    depends only on the arguments: within the budgets that are allowed NGOpt draws no random numbers. NumPy's global
    random state stays as it was.

    Args:
        loss_of: from weights [modules] in float64 to a loss.
        modules: N.
        settings: budget, bound and penalty.
        shots: that the loss is of.

    Raises:
        ConfigError: for a budget beyond `CANDIDATES_PER_MODULE`, or when nevergrad is not installed.
    """
    check_budget(settings, modules)

    def objective(weights_N: np.ndarray) -> float:
        return float(loss_of(weights_N)) / shots + settings.penalty * float(np.mean(np.abs(weights_N)))

    with _global_state_kept():
        optimizer = _optimizer(modules, settings)
        try:
            tried: dict[bytes, float] = {}
            for _ in range(settings.budget):
                candidate = optimizer.ask()
                value = tried[candidate.value.tobytes()] = objective(candidate.value)
                optimizer.tell(candidate, value)
            weights_N = np.array(optimizer.provide_recommendation().value)
        finally:
            # It has a thread that waits for answers and would keep the process from ending; its deletion ends it.
            del optimizer
    known = tried.get(weights_N.tobytes())
    return Found(weights_N, objective(weights_N) if known is None else known)


def check_budget(settings: HubConfig, modules: int) -> None:
    """Raises ConfigError for a search that NGOpt could not finish, or not repeat."""
    if settings.budget > CANDIDATES_PER_MODULE * modules:
        raise ConfigError(
            f"hub.budget is {settings.budget}; a search over {modules} modules takes at most"
            f" {CANDIDATES_PER_MODULE * modules} candidates: with more, NGOpt takes methods that fail with this NumPy"
            " or cannot be repeated",
            field="hub.budget",
        )


def require_nevergrad() -> Any:
    """The library of the search.

    Raises:
        ConfigError: when it is not installed.
    """
    try:
        import nevergrad
    except ModuleNotFoundError as error:
        raise ConfigError(
            "nevergrad is not installed", field="nevergrad", remedy="pip install 'lora_gen_jax[hub]'"
        ) from error
    return nevergrad


def _optimizer(modules: int, settings: HubConfig) -> Any:
    nevergrad = require_nevergrad()
    weights = nevergrad.p.Array(init=np.zeros(modules), lower=-settings.bound, upper=settings.bound)
    weights.random_state = np.random.RandomState(0)
    return nevergrad.optimizers.NGOpt(parametrization=weights, budget=settings.budget, num_workers=1)


@contextlib.contextmanager
def _global_state_kept() -> Iterator[None]:
    state = np.random.get_state()
    try:
        with warnings.catch_warnings():
            # NGOpt calls SciPy's COBYLA with a tolerance of 0, and at the end with fewer calls than it wants.
            warnings.filterwarnings("ignore", r"COBYLA: Invalid (RHOEND|MAXFUN)", UserWarning)
            yield
    finally:
        np.random.set_state(state)
