"""docs/figures/rl_step.svg: one user of a latent GRPO step, and the mask of its packed row as the code builds it."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from flr.model.packed_members import member_mask
from flr.report.drawing import LIGHT, WIDTH, new_figure, save_svg, styled

PROMPT, MEMBERS, STEPS = 9, 4, 4  # L, G, S of the picture
BLUE, ORANGE, GREY = LIGHT.first, "#e69f00", "#b4bcc4"
SUBSCRIPTS = "₀₁₂₃"


def mask() -> torch.Tensor:
    """bool [G S, L + G S] of a row with two columns of padding."""
    seen = torch.tensor([[0, 0] + [1] * (PROMPT - 2)])
    member, offset = torch.arange(MEMBERS).repeat_interleave(STEPS), torch.arange(STEPS).repeat(MEMBERS)
    return member_mask(seen, member, offset, MEMBERS * STEPS)[0]


def boxes(ax, x: float, y: float, count: int, colours: list[str], size: float = 0.36) -> None:
    for i in range(count):
        ax.add_patch(Rectangle((x + i * size, y), size * 0.86, size * 0.86, color=colours[min(i, len(colours) - 1)]))


def arrow(ax, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=LIGHT.soft, linewidth=1))


def draw() -> Figure:
    """The step on the left, its mask on the right."""
    figure = new_figure(figsize=(WIDTH, 3.2))
    flow, matrix = figure.subplots(1, 2, width_ratios=[1.75, 1])
    flow.set(xlim=(0, 8.4), ylim=(-0.35, 4.4), aspect="equal")
    flow.axis("off")
    boxes(flow, 0.1, 3.3, PROMPT, [GREY])
    flow.text(0.1, 3.85, "prompt, L tokens:\nencoded once, no graph")
    arrow(flow, (1.7, 3.2), (1.7, 2.75))
    flow.text(0.75, 2.45, "H (last layer)")
    arrow(flow, (1.7, 2.35), (1.7, 1.9))
    flow.text(0.72, 1.6, "reasoner → r", color=BLUE, weight="bold")
    for i in range(MEMBERS):
        y = 2.55 - i * 0.72
        name = "anchor + r" if i == 0 else f"anchor + r + σ ε{SUBSCRIPTS[i]}"
        flow.text(5.12, y + 0.08, name, ha="right", color=BLUE)
        boxes(flow, 5.25, y, STEPS, [BLUE, ORANGE])
        arrow(flow, (6.75, y + 0.16), (7.1, y + 0.16))
        flow.text(7.15, y + 0.08, f"log p → R{SUBSCRIPTS[i]}")
        arrow(flow, (2.35, 1.68), (3.02, y + 0.16))
    arrow(flow, (3.45, 3.45), (5.2, 3.1))
    flow.text(4.75, 3.55, "keys and values of the prompt:\none copy, seen by all members")
    flow.text(4.0, -0.2, "thought, then S - 1 target tokens", fontsize=8.5, color=LIGHT.soft)
    seen = mask()
    matrix.imshow(seen, cmap=ListedColormap(["white", BLUE]), aspect="equal", interpolation="nearest")
    matrix.axvline(PROMPT - 0.5, color=LIGHT.text, linewidth=0.8)
    for i in range(1, MEMBERS):
        matrix.axhline(i * STEPS - 0.5, color=GREY, linewidth=0.6)
    matrix.set_xticks(
        [PROMPT / 2 - 0.5, PROMPT + MEMBERS * STEPS / 2 - 0.5], ["prompt,\n2 padding", "G · S columns\nof the row"]
    )
    matrix.set_yticks([i * STEPS + STEPS / 2 - 0.5 for i in range(MEMBERS)], [f"member {i}" for i in range(MEMBERS)])
    matrix.tick_params(length=0, labelcolor=LIGHT.text)
    matrix.set_title("Who sees what")
    return figure


def main() -> None:
    path = Path(__file__).parents[1] / "docs/figures/rl_step.svg"
    with styled():
        save_svg(draw(), path)
    print(path)


if __name__ == "__main__":
    main()
