"""Time every tile of the attention kernels on this GPU and name the fastest beside the one that dispatch chooses.

    python scripts/tune_tiles.py [--json FILE] [--backward] [--wide]

Besides the tiles of ``flr_kernels.backends.triton_config``, ``--wide`` tries neighbours (columns, stages, warps). Each
is checked against the chosen tile's result before it is timed. A change of ``triton_config`` should quote the output of
this script.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from flr_kernels.backends import triton_config

CASES = [(64, 512, 1536, 4), (64, 512, 4096, 4), (512, 64, 1536, 4), (1, 4096, 4096, 4), (16, 2048, 2048, 8)]


def candidates(itemsize: int, backward: bool, wide: bool) -> list[triton_config.Tile]:
    found = list(triton_config.tiles(itemsize, backward))
    found += [dataclasses.replace(tile, name=f"{tile.name} past L1", cache=".cg") for tile in found]
    if wide:
        for tile, scale, stages, warps in product(tuple(found), (0.5, 1, 2), (2, 3, 4, 5), (4, 8)):
            columns = int(tile.block_d * scale)
            name = f"{tile.block_l}x{columns} s{stages} w{warps} {tile.cache}"
            new = dataclasses.replace(tile, name=name, block_d=columns, num_stages=stages, num_warps=warps)
            found.append(new)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--wide", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_tiles: no GPU here, nothing to time")
        return 0
    import triton

    from flr_kernels.backends.triton_launch import arch
    from flr_kernels.ops.factor_attention import triton_host as op

    results = []
    for batch, length, size, factors in CASES:
        h = torch.randn(batch, length, size, device="cuda", dtype=torch.bfloat16)
        u = (torch.randn(batch, factors, size, device="cuda") / size**0.5).bfloat16()
        saved = op.forward(h, u, None)
        grads = tuple(torch.randn_like(x) for x in saved)

        def call(tile, h=h, u=u, saved=saved, grads=grads):
            if arguments.backward:
                return op.backward(h, u, None, saved, grads, True, tile=tile)
            return op.forward(h, u, None, tile=tile)

        chosen = triton_config.attention_tile(arch(h), batch, length, h.dtype, backward=arguments.backward)
        expected = call(chosen)
        moved = h.numel() * h.itemsize * (2 if arguments.backward else 1)
        rows = []
        for tile in candidates(2, arguments.backward, arguments.wide):
            row = {"case": [batch, length, size, factors], "tile": dataclasses.asdict(tile), "chosen": tile == chosen}
            try:
                for a, e in zip(call(tile), expected, strict=True):
                    torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)
                row["ms"] = triton.testing.do_bench(lambda tile=tile: call(tile), return_mode="median")
                row["gb_per_s"] = moved / row["ms"] / 1e6
            except (triton.runtime.errors.OutOfResources, AssertionError) as error:
                row["error"] = str(error).splitlines()[0]
            rows.append(row)
        results += rows
        timed = sorted((r for r in rows if "ms" in r), key=lambda r: r["ms"])
        for row in timed[:4] + [r for r in timed[4:] if r["chosen"]]:
            mark = "  <- chosen" if row["chosen"] else ""
            print(
                f"B{batch} L{length} D{size} K{factors}: {row['tile']['name']:18} {row['ms']:.3f} ms "
                f"{row['gb_per_s']:7.0f} GB/s{mark}"
            )
        for row in rows:
            if "error" in row:
                print(f"B{batch} L{length} D{size} K{factors}: {row['tile']['name']:18} {row['error']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
