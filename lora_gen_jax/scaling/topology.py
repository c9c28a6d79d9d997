"""TPU chips that are not there, for the compiler to compile for.

In: a name such as ``v5e:4x4``, or ``2*v5e:4x4`` for two slices. Out: their devices and published figures. libtpu has
the compiler; it needs no TPU. It logs to standard error from C++, so it is told to be quiet before it is loaded.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.scaling.chips import CHIPS, Chip

REMEDY = "install it with: pip install 'lora_gen_jax[tpu]'"
# libtpu asks the machine what TPU it is on, logs that there is none, and locks out a second process that loads it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# A v4 chip has two cores, which programs use as one device unless told otherwise.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips to compile for.

    Attributes:
        name: as given.
        chip: their published figures.
        devices: for a mesh; nothing can be put on them.
        slices: how many slices they are on.
    """

    name: str
    chip: Chip
    devices: list[Any]
    slices: int


def get_topology(name: str) -> Topology:
    """The chips of that name.

    Raises:
        ConfigError: for a name that is not understood or that libtpu does not know, and without libtpu.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if found is None or found[2] not in CHIPS or (found[1] and int(found[1]) < 1):
        raise ConfigError(
            f"topology {name!r} is not understood",
            field="--topology",
            code="unknown",
            remedy="write chip:AxB, as v5e:4x4 or v5p:2x2x4, or 2*v5e:4x4 for two slices; chips are"
            f" {', '.join(CHIPS)}",
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for a TPU needs libtpu, which has the compiler", field="libtpu", remedy=REMEDY)
    _stay_on_the_host()
    from jax.experimental import topologies

    slices, chip = int(found[1] or 1), found[2]
    options = _OPTIONS.get(chip, {}) | ({"num_slices": slices} if slices > 1 else {})
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip}:{found[3]}",
            **options,  # pyright: ignore[reportArgumentType]
        )
    except Exception as error:
        line = str(error).splitlines()[0]
        raise ConfigError(
            f"topology {name!r} does not exist ({line})",
            field="--topology",
            code="no such size",
            remedy="choose a size that the chip is sold in",
        ) from error
    return Topology(name, CHIPS[chip], list(topology.devices), slices)


def _stay_on_the_host() -> None:
    # Nothing here runs on a device. Without this JAX would look for a TPU, or take a GPU's memory. A process that has a
    # backend already keeps it.
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
