"""The README's picture: test loss over AdamW's on real tables, drawn from the study's committed figures.

    python experiments/benefit.py      # reads docs/results/shrinkage/tables.json, writes docs/benefit.svg

`ROWS` names what is drawn; a row is an arm of the study and its label.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs/results/shrinkage/tables.json"
PICTURE = ROOT / "docs/benefit.svg"

TITLE = "Test loss over AdamW's, mean over 24 tables"
CAPTION = "left of the line: better than AdamW"
ROWS = (
    ("adamw", "AdamW"),
    ("adamw-matched to snr", "AdamW, smaller steps"),
    ("L1 linear model, tuned", "L1 linear model"),
    ("adamw, decoupled L1", "AdamW, decoupled L1"),
    ("boosted trees, tuned", "boosted trees"),
    ("snr", "PRM"),
    ("snr, shrinkage", "PRM with shrinkage"),
)
WIDTH, TOP, LINE, LEFT, RIGHT = 560, 92, 32, 200, 524
LOW, HIGH, TICKS = 0.5, 1.4, (0.6, 0.8, 1.0, 1.2, 1.4)
INK, GREY, PRM, OURS = "#17212f", "#8a94a3", "#2f6db3", "#dde9f7"


def ratios(found: dict[str, dict[str, dict[str, dict[str, float]]]], probes: int) -> list[float]:
    """Return each row's loss over AdamW's, with so many columns that say nothing."""
    arms = found[str(probes)]["arms"]
    return [1.0 if arm == "adamw" else arms[arm]["over adamw"] for arm, _ in ROWS]


def place(ratio: float) -> float:
    """Return where a ratio lies on the x axis."""
    return LEFT + (ratio - LOW) / (HIGH - LOW) * (RIGHT - LEFT)


def text(x: float, y: float, words: str, size: float = 15, anchor: str = "start", fill: str = INK) -> str:
    """Return a line of text."""
    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {where}>{escape(words)}</text>"


def draw(noisy: Sequence[float], plain: Sequence[float]) -> str:
    """Return the picture: a full point with 500 such columns, a hollow one without."""
    height = TOP + LINE * len(ROWS) + 34
    bottom = TOP + LINE * len(ROWS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" '
        f'role="img" aria-label="{escape(TITLE)}">',
        f'<rect width="100%" height="100%" rx="10" fill="#ffffff"/>{text(16, 28, TITLE, 17)}',
        f'<circle cx="22" cy="47" r="6" fill="{INK}"/>{text(34, 52, "with 500 columns that say nothing", 14)}',
        f'<circle cx="292" cy="47" r="5" fill="#ffffff" stroke="{INK}" stroke-width="2"/>'
        f"{text(304, 52, 'as the tables come', 14)}{text(16, 74, CAPTION, 14, fill='#5b6675')}",
    ]
    for tick in TICKS:
        x, width = place(tick), 2 if tick == 1 else 1
        stroke = INK if tick == 1 else "#d5dae1"
        lines.append(f'<path d="M{x:.1f} {TOP - 6}V{bottom}" stroke="{stroke}" stroke-width="{width}"/>')
        lines.append(text(x, bottom + 20, f"{tick:g}", 14, "middle", "#5b6675"))
    for i, ((arm, label), with_noise, without) in enumerate(zip(ROWS, noisy, plain, strict=True)):
        y = TOP + LINE * (i + 0.5)
        color = PRM if label.startswith("PRM") else GREY
        if color == PRM:
            corner = f'x="8" y="{y - LINE / 2 + 1:.0f}"'
            lines.append(f'<rect {corner} width="{LEFT - 14}" height="{LINE - 2}" fill="{OURS}"/>')
        lines += [
            text(LEFT - 12, y + 5, label, 14, "end"),
            f'<path d="M{place(with_noise):.1f} {y}H{place(without):.1f}" stroke="{color}" stroke-width="1.5"/>',
            f'<circle cx="{place(without):.1f}" cy="{y}" r="5" fill="#ffffff" stroke="{color}" stroke-width="2"/>',
            f'<circle cx="{place(with_noise):.1f}" cy="{y}" r="6.5" fill="{color}"/>',
        ]
        if arm != "adamw":
            lines.append(text(place(with_noise), y - 9, f"{with_noise:.2f}", 11, "middle", color))
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Read the study's figures and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=FIGURES, help="the study's tables.json")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture to write")
    args = parser.parse_args()
    found = json.loads(args.figures.read_text())
    args.out.write_text(draw(ratios(found, 500), ratios(found, 0)))


if __name__ == "__main__":
    main()
