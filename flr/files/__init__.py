"""Files: whole or not at all, sealed, locked."""

from .sealed import MANIFEST, check_seal, exclusive_folder, move_files, place_folder, seal_folder, to_disk
from .whole import (
    NOT_UTF8,
    PathLike,
    atomic_file,
    atomic_folder,
    bounded_lines,
    check_regular,
    naming,
    read_json,
    read_parquet,
    sha256,
    shown,
    temporary_folder,
    write_json,
    write_parquet,
)

__all__ = [
    "MANIFEST",
    "NOT_UTF8",
    "PathLike",
    "atomic_file",
    "atomic_folder",
    "bounded_lines",
    "check_regular",
    "check_seal",
    "exclusive_folder",
    "move_files",
    "naming",
    "place_folder",
    "read_json",
    "read_parquet",
    "seal_folder",
    "sha256",
    "shown",
    "temporary_folder",
    "to_disk",
    "write_json",
    "write_parquet",
]
