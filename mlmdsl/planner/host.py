"""What ranks on a CPU do besides their kernels: the runtime's own work, in the time of the passes, and waiting, which leaves
their cores to others. On a GPU the host's work hides behind the device's.

The runtime's work is Python and C++ that grows with neither shapes nor threads, and is counted in launches of a kernel, which
`mlmdsl probe` measures on every machine. How many was measured on two cores with torch 2.13 (CPU seconds of passes through
stages and FSDP2's units of one to eight layers of 16 features, less those of the layers by themselves; a launch took 6 us):

    a pass through a stage of torch's pipelining: inputs waited for and looked up, outputs kept, hand-overs made ready   36
    a backward pass in two parts, gradients of inputs and of weights: the graph is walked in Python, a kernel            4.5
    a unit of FSDP2 that is gathered and reduced: buffers laid out, copied and cut                                       110
    its hooks in a micro-batch, forward and backward, and those of each of its weights                                   15, 5
"""

from __future__ import annotations

PASS = 36.0  # launches, of a pass through a stage of a pipeline
_APART = 4.5
_UNIT = 110.0
_HOOKS = 15.0
_WEIGHT = 5.0


def apart_launches(kernels: float) -> float:
    """What a backward pass of so many kernels takes longer in two parts."""
    return PASS + _APART * kernels


def unit_launches(units: int) -> float:
    """Of units that are gathered, or of ones that are reduced."""
    return units * _UNIT / 2


def hook_launches(units: int, weights: int) -> float:
    """Of a forward or a backward pass through so many units with so many weights in all."""
    return (units * _HOOKS + weights * _WEIGHT) / 2


def idle_share(cores: float | None, together: int, pipeline: int) -> float:
    """Of the time that ranks of a pipeline wait for each other, what is left where stages share cores: a node runs `together`
    of the stages, each on `cores` cores while all of them are busy, and on up to one while others wait. While j of k stages
    run, as in filling and draining, they are min(1 / cores, k / j) times as fast, so that of k - 1 turns of waiting

        2 x (max(cores, 1/k) + .. + max(cores, (k-1)/k)) - (k - 1)

    are left. Stages on other nodes wait as ever."""
    if cores is None or cores >= 1.0 or together == 1:
        return 1.0
    left = 2 * sum(max(cores, j / together) for j in range(1, together)) - (together - 1)
    return 1 - (together - 1 - left) / (pipeline - 1)
