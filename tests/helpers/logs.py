"""Files of logs as readers take them."""

from __future__ import annotations


def recbole(folder, rows, header="user_id:token\titem_id:token\trating:float\ttimestamp:float", items=None):
    folder.mkdir(exist_ok=True)
    (folder / "ml.inter").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    if items is not None:
        (folder / "ml.item").write_text("\n".join(items) + "\n", encoding="utf-8")
    return folder


ROWS = [f"u{u}\ti{(u + i) % 5}\t4\t{100 * i + u}.0" for u in range(10) for i in range(5)]
