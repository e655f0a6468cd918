"""How well a machine that plans are made for predicts layers here, and what its constants would be here.

Operations and layers, dense and factorised, spread over every method's menu, are timed; the committed constants of a
machine (`compresskit/machines`) and constants fitted to these very times are compared with them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome, SuiteError
from benchmarks.timing import WAYS


@final
@dataclass(frozen=True, kw_only=True)
class CostModel(Experiment):
    """Prediction against measurement.

    Args:
        machine: whose constants are compared; its type is that of the layers.
        methods: of compresskit.
        shapes: of weights, as rows x cols.
        rounds: of which the best counts.
        kernel: `pytorch` or `compiled`: what layers run by.
        device: where they run.
    """

    kind: ClassVar[str] = "cost-model"

    machine: str
    methods: tuple[str, ...] = ("kronecker", "svd", "tucker", "tensor-train", "blast", "monarch")
    shapes: tuple[str, ...] = ("768x768", "3072x768", "768x3072", "384x384", "1536x384", "4096x4096")
    rounds: int = 20
    kernel: str = WAYS[0]
    device: str = "cpu"

    def run(self, data: Path | None) -> Outcome:
        from compresskit.errors import CompresskitError
        from compresskit.machines import closeness, machine, machine_to_data, measure_machine

        try:
            committed = machine(self.machine)
            shapes = [(int(rows), int(cols)) for rows, cols in (shape.split("x") for shape in self.shapes)]
            how = {"device": self.device, "methods": self.methods, "shapes": shapes, "rounds": self.rounds}
            here = measure_machine(self.machine, committed.dtype, **how)
        except (CompresskitError, ValueError) as error:
            raise SuiteError(f"{self.kind}: {error}") from error
        return Outcome(
            {
                "layers": len(here.times_s),
                "committed": _plain(closeness(committed, here.times_s)),
                "here": _plain(here.closeness),
                "machine": machine_to_data(here.machine),
            }
        )

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        kinds = figures["committed"]
        return {
            "machine": configuration["machine"],
            "layers": f"{figures['layers']}",
            **{
                f"{kind}: off by, median and 90 % (fitted here); slower though expected faster": (
                    f"{of['off_median']:.2f}, {of['off_90']:.2f} "
                    f"({figures['here'][kind]['off_median']:.2f}, {figures['here'][kind]['off_90']:.2f}); "
                    f"{of['faster_but_slower']} of {of['number']}"
                )
                for kind, of in kinds.items()
            },
        }


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: dataclasses.asdict(value) for kind, value in found.items()}
