"""Renders the icons: pictures, names, the split, and the held-out captions.

    python -m mmspec.assets.forge.emoji.make_data --work-dir build/emoji

Needs `npm` (the two icon packages go to the work folder) and the Python package `resvg_py`. Writes
`pictures.npz`, `icons.jsonl` and `data.json` (hashes, versions) to the work folder.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from .icons import PACKAGES, SIZE, Icon, read_icons, split_icons
from .nearness import nearest_rmse

TWIN_RMSE = 0.05  # of the range of pixel values


def fetch_packages(work_dir: Path) -> dict[str, Path]:
    """Downloads and unpacks the two icon packages unless present; returns their folders."""
    folders = {}
    for style, package in PACKAGES.items():
        folder = work_dir / style / "package"
        if not folder.exists():
            command = ["npm", "pack", "--silent", package]
            out = subprocess.run(command, cwd=work_dir, check=True, capture_output=True, text=True)
            with tarfile.open(work_dir / out.stdout.split()[-1]) as archive:
                archive.extractall(work_dir / style, filter="data")
        folders[style] = folder
    return folders


def render(icon: Icon) -> np.ndarray:
    """Draws one icon on white; returns uint8 (64, 64, 3)."""
    width, height = icon.view
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}">{icon.body}</svg>'
    )
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    paper = Image.new("RGBA", drawn.size, "white")
    return np.asarray(Image.alpha_composite(paper, drawn).convert("RGB"))


def set_twins_aside(split: dict[str, list[Icon]], pictures: dict[str, np.ndarray]) -> None:
    """Moves held-out icons that training shows under another name to the part "twins"."""
    is_twin = nearest_rmse(pictures["names"], pictures["train"])[0] < TWIN_RMSE
    names = split["names"]
    split["twins"] = [icon for icon, twin in zip(names, is_twin, strict=True) if twin]
    split["names"] = [icon for icon, twin in zip(names, is_twin, strict=True) if not twin]
    pictures["twins"] = pictures["names"][is_twin]
    pictures["names"] = pictures["names"][~is_twin]


def main() -> None:
    """Makes everything that the later steps read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    folders = fetch_packages(args.work_dir)
    icons = [icon for style, folder in folders.items() for icon in read_icons(folder, style)]
    split = split_icons(icons)
    pictures = {part: np.stack([render(icon) for icon in split[part]]) for part in split}
    set_twins_aside(split, pictures)
    np.savez_compressed(args.work_dir / "pictures.npz", **pictures)
    rows = [
        {"split": part, "name": icon.name, "style": icon.style, "category": icon.category}
        for part in split
        for icon in split[part]
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (args.work_dir / "icons.jsonl").write_text(lines)
    joined = b"".join(pictures[part].tobytes() for part in pictures)
    record = {
        "num_icons": {part: len(split[part]) for part in split},
        "num_heldout_names": len({icon.name for icon in split["names"]}),
        "packages": PACKAGES | {"resvg_py": importlib.metadata.version("resvg_py")},
        "sha256": {
            "pictures": hashlib.sha256(joined).hexdigest(),
            "icons": hashlib.sha256(lines.encode()).hexdigest(),
        },
    }
    (args.work_dir / "data.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["num_icons"]))


if __name__ == "__main__":
    main()
