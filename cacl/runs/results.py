"""What a run has left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cacl.log import Record
from cacl.runs.folder import RunFolder


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    out: Path
    """The run folder."""
    metrics: dict[str, Record]
    """``metrics.json``: for each evaluation its mIoU with split, background score, CRF, number of images."""

    @property
    def pictures(self) -> list[Path]:
        """The pictures that the run has made."""
        return sorted((self.out / "report").glob("*.png"))

    @property
    def report(self) -> Path | None:
        """The report, if it was made."""
        path = self.out / "report" / "index.html"
        return path if path.is_file() else None

    def summary(self) -> str:
        """A line for each evaluation, how the agreement goes along the chain, and where the pictures are."""
        scores = {name: score for name, score in RunFolder(self.out).scores().items() if name in self.metrics}
        lines = [f"{name}: {score}" for name, score in scores.items()]
        judged = [score for score in scores.values() if score.judged is not None]
        if len(judged) > 1:
            figures = " → ".join(f"{score.agreement:.3f}" for score in judged)
            splits = ["", *(f" of {score.split}" if score.split != judged[0].split else "" for score in judged[1:])]
            names = " → ".join(f"{score.what}{split}" for score, split in zip(judged, splits, strict=True))
            lines.append(f"without masks: agreement {figures} ({names})")
        lines += [f"picture: {path}" for path in self.pictures]
        return "\n".join([*lines, *([f"report: {self.report}"] if self.report else [])])
