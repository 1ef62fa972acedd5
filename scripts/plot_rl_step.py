"""docs/figures/rl_step.svg: one user of a latent GRPO step, and the mask of its packed row as the code builds it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from flr.model.packed_members import member_mask

PROMPT, MEMBERS, STEPS = 9, 4, 4  # L, G, S of the picture
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#bbbbbb"


def mask() -> torch.Tensor:
    """bool [G S, L + G S] of a row with two columns of padding."""
    seen = torch.tensor([[0, 0] + [1] * (PROMPT - 2)])
    member, offset = torch.arange(MEMBERS).repeat_interleave(STEPS), torch.arange(STEPS).repeat(MEMBERS)
    return member_mask(seen, member, offset, MEMBERS * STEPS)[0]


def boxes(ax, x: float, y: float, count: int, colours: list[str], size: float = 0.36) -> None:
    for i in range(count):
        ax.add_patch(Rectangle((x + i * size, y), size * 0.86, size * 0.86, color=colours[min(i, len(colours) - 1)]))


def arrow(ax, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="#444444", linewidth=1))


def main() -> None:
    mpl.rcParams.update({"svg.hashsalt": "flr", "font.family": "DejaVu Sans", "font.size": 9})
    figure = Figure(figsize=(10.4, 3.5), layout="constrained")
    flow, matrix = figure.subplots(1, 2, width_ratios=[1.55, 1])
    flow.set(xlim=(0, 8.4), ylim=(-0.35, 4.4), aspect="equal")
    flow.axis("off")
    boxes(flow, 0.1, 3.3, PROMPT, [GREY])
    flow.text(0.1, 3.85, "prompt, L tokens: encoded once, no graph")
    arrow(flow, (1.7, 3.2), (1.7, 2.75))
    flow.text(0.75, 2.45, "H (last layer)")
    arrow(flow, (1.7, 2.35), (1.7, 1.9))
    flow.text(0.72, 1.6, "reasoner → r", color=BLUE, weight="bold")
    for i in range(MEMBERS):
        y = 2.55 - i * 0.72
        name = "anchor + r" if i == 0 else f"anchor + r + σ ε$_{i}$"
        flow.text(5.12, y + 0.08, name, ha="right", color=BLUE)
        boxes(flow, 5.25, y, STEPS, [BLUE, ORANGE])
        arrow(flow, (6.75, y + 0.16), (7.1, y + 0.16))
        flow.text(7.15, y + 0.08, f"log p → R$_{i}$")
        arrow(flow, (2.35, 1.68), (3.02, y + 0.16))
    arrow(flow, (3.4, 3.45), (5.2, 3.1))
    flow.text(4.4, 3.45, "keys and values of the prompt, one copy, seen by all members")
    flow.text(5.25, -0.25, "thought, then S - 1 target tokens", fontsize=8)
    seen = mask()
    matrix.imshow(seen, cmap=mpl.colors.ListedColormap(["white", BLUE]), aspect="equal", interpolation="nearest")
    matrix.axvline(PROMPT - 0.5, color="black", linewidth=0.8)
    for i in range(1, MEMBERS):
        matrix.axhline(i * STEPS - 0.5, color=GREY, linewidth=0.6)
    matrix.set_xticks(
        [PROMPT / 2 - 0.5, PROMPT + MEMBERS * STEPS / 2 - 0.5], ["prompt (2 padding)", "G · S columns of the row"]
    )
    matrix.set_yticks([i * STEPS + STEPS / 2 - 0.5 for i in range(MEMBERS)], [f"member {i}" for i in range(MEMBERS)])
    matrix.tick_params(length=0)
    matrix.set_title("who sees what", fontsize=9, loc="left")
    path = Path(__file__).parents[1] / "docs/figures/rl_step.svg"
    figure.savefig(path, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    main()
