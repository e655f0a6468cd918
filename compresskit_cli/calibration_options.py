"""Options that say what text a model is calibrated on, for every command that fits weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compresskit import OnProgress
    from compresskit.calibration import Calibration, Judge

F = TypeVar("F", bound=Callable[..., Any])

SAMPLES, MAX_LENGTH = 128, 128
PARAMETERS, BALANCED, MEASURED, SEARCHED = "parameters", "balanced", "measured", "searched"
MEASURED_SHARE = 4
"""Sensitivities are measured or searched, and models compared, on one of so many batches, all lengths among them: each
layer, or each model, takes a pass over them."""


@dataclass(frozen=True)
class Samples:
    """What the shared options say."""

    calibrate: str | None
    samples: int | None
    max_length: int | None
    gradients: bool
    calibration: Path | None
    sequential: bool = False
    refine: int | None = None
    sensitivity: str = PARAMETERS
    robust: bool = False
    even_words: bool = False
    compare: bool = False

    @property
    def tries_models(self) -> bool:
        """Whole models are compared or searched."""
        return self.compare or self.sensitivity == SEARCHED

    def check(self, *, judged: bool = False) -> None:
        """Raise UsageError where options contradict each other.

        Args:
            judged: whole models are judged by a task, which takes no texts.
        """
        if self.calibrate is not None and self.calibration is not None:
            raise click.UsageError("--calibrate collects from texts, --calibration reads a file: give one of them")
        given = {"--samples": self.samples, "--max-length": self.max_length, "--gradients": self.gradients or None}
        if self.calibration is None:
            given |= {"--robust": self.robust or None, "--even-words": self.even_words or None}
        given |= {"--sequential": self.sequential or None, "--refine": self.refine}
        if not judged:
            given |= {"--compare": self.compare or None}
        if not (judged and self.sensitivity == SEARCHED):
            given |= {f"--sensitivity {self.sensitivity}": (self.sensitivity != PARAMETERS) or None}
        idle = [option for option, value in given.items() if value is not None]
        if idle and self.calibrate is None:
            task = " or --judge TASK" if self.tries_models else ""
            raise click.UsageError(
                f"{' and '.join(idle)} need --calibrate FILE_OR_FOLDER, the texts to calibrate on{task}"
            )

    def check_methods(self, arguments: Mapping[str, Any]) -> None:
        """Raise UsageError if plans are to be compared of methods that do not choose between others.

        Args:
            arguments: of `compresskit.compress`.
        """
        methods = [arguments["method"], *(method for _, method in arguments["rules"])]
        found = [method for method in methods if method is not None]
        if self.compare and not any(method.alone() for method in found):
            names = " and ".join(sorted({method.name for method in found}))
            raise click.UsageError(
                f"--compare is for a method that chooses between others, as auto does: {names} does not"
            )

    def given(self) -> dict[str, Any]:
        """What was said at all, for the record; names, not whole paths."""
        said: dict[str, Any] = {}
        if self.calibrate is not None:
            said = {"calibrate": Path(self.calibrate).name, "samples": self.samples or SAMPLES}
            said |= {"max_length": self.max_length or MAX_LENGTH, "gradients": self.gradients}
            said |= {"sequential": self.sequential, "refine": self.refine}
        elif self.calibration is not None:
            said = {"calibration": self.calibration.name}
        if said:
            said |= {"robust": self.robust, "even_words": self.even_words}
        if said or self.tries_models:
            said |= {"sensitivity": self.sensitivity}
        return said | ({"compare": True} if self.compare else {})

    def collect(
        self,
        model: "PreTrainedModel",
        folder: Path,
        *,
        seed: int,
        planning: bool = True,
        judge: "Judge | None" = None,
        on_progress: "OnProgress | None" = None,
    ) -> dict[str, Any]:
        """Arguments for `compresskit.compress` and `apply`: the calibration, and how layers are fitted to it.

        Args:
            planning: a plan is to be made; what only that takes is left out otherwise.
            judge: what whole models are tried by; None: their answers on the texts.
        """
        from compresskit.calibration import Refine, balanced, load_calibration, measure_sensitivities

        tried = self._tried(judge) if planning and judge is not None else {}
        if self.calibration is not None:
            read = load_calibration(self.calibration)
            read.check(model)
            return {"calibration": self._weighed(read), "robust": self.robust, **tried}
        if self.calibrate is None:
            return tried
        size = {"samples": self.samples or SAMPLES, "max_length": self.max_length or MAX_LENGTH, "seed": seed}
        made = collect(model, folder, self.calibrate, gradients=self.gradients, on_progress=on_progress, **size)
        found: dict[str, Any] = {"calibration": self._weighed(made), "robust": self.robust, **tried}
        measures = planning and self.sensitivity in (BALANCED, MEASURED)
        by_answers = planning and self.tries_models and judge is None
        if not (self.sequential or self.refine or measures or by_answers):
            return found
        texts = batches(folder, self.calibrate, **size)
        few = texts[::MEASURED_SHARE]
        if by_answers:
            found |= self._tried(few)
        if measures:
            measured = measure_sensitivities(model, few, made, on_progress=on_progress)
            found["sensitivities"] = balanced(model, measured) if self.sensitivity == BALANCED else measured
        if self.sequential or self.refine:
            found |= {"samples": texts, "sequential": self.sequential}
            found["refine"] = None if self.refine is None else Refine(epochs=self.refine)
        return found

    def _tried(self, by: Any) -> dict[str, Any]:
        """What of a plan is found by whole models, and by what of them."""
        return {
            name: by for name, wanted in (("search", self.sensitivity == SEARCHED), ("compare", self.compare)) if wanted
        }

    def _weighed(self, calibration: "Calibration") -> "Calibration":
        return calibration.with_even_words() if self.even_words else calibration


def batches(folder: Path, data: str, *, samples: int, max_length: int, seed: int) -> list[Any]:
    """The texts that `collect` calibrates on."""
    from compresskit.calibration import read_batches
    from compresskit.tasks import tokenizer_for

    return list(read_batches(Path(data), tokenizer_for(folder), samples=samples, max_length=max_length, seed=seed))


def collect(
    model: "PreTrainedModel",
    folder: Path,
    data: str,
    *,
    samples: int,
    max_length: int,
    gradients: bool,
    seed: int,
    on_progress: "OnProgress | None",
    **options: Any,
) -> "Calibration":
    """Calibrate with the tokenizer in the model's folder; says on the standard error what memory that takes."""
    from compresskit.calibration import calibrate
    from compresskit.tasks import tokenizer_for
    from compresskit_cli.render import progress_console, size

    return calibrate(
        model,
        Path(data),
        tokenizer=tokenizer_for(folder),
        samples=samples,
        max_length=max_length,
        gradients=gradients,
        seed=seed,
        on_memory=lambda num_bytes: progress_console.print(f"Moments of the layers take {size(num_bytes)}."),
        on_progress=on_progress,
        provenance={"data": Path(data).name, "samples": samples, "max_length": max_length, "seed": seed},
        **options,
    )


def calibration_options(function: F) -> F:
    """Adds the options that make fits data-aware."""
    options = [
        click.option("--calibrate", metavar="FILE_OR_FOLDER", help="Fit to what layers see on these texts (*.txt)."),
        click.option("--samples", type=click.IntRange(1), help=f"Texts for --calibrate. Default: {SAMPLES}."),
        click.option("--max-length", type=click.IntRange(2), help=f"Tokens of such a text. Default: {MAX_LENGTH}."),
        click.option("--gradients", is_flag=True, help="Also weigh by gradients at the outputs (K-FAC)."),
        click.option(
            "--sensitivity",
            type=click.Choice((PARAMETERS, BALANCED, MEASURED, SEARCHED)),
            default=PARAMETERS,
            help="What a layer's error counts: its parameters, what it does to the model's output on the texts, both, "
            "or what makes the best of some models.",
        ),
        click.option(
            "--compare",
            is_flag=True,
            help="Where a method chooses between others (auto), also make models of one of them alone and keep what "
            "answers nearest on the texts; with --sensitivity searched, each is searched.",
        ),
        click.option("--robust", is_flag=True, help="Expect inputs to be off, since layers before are compressed too."),
        click.option("--even-words", is_flag=True, help="All words count alike, not as often as the texts have them."),
        click.option(
            "--calibration", type=click.Path(path_type=Path), help="What `compresskit calibrate` saved, instead."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def sequential_options(function: F) -> F:
    """Adds the options that say how layers are fitted to the texts of `--calibrate`."""
    options = [
        click.option("--sequential", is_flag=True, help="Fit layer after layer, making up for the errors before it."),
        click.option(
            "--refine",
            type=click.IntRange(1),
            metavar="EPOCHS",
            help="Then train each layer to answer as the dense one.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function
