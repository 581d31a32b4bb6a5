"""Render the icons that the text-to-image teacher is trained on, from two icon sets on npm.

    npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9      and unpack both
    pip install resvg-py
    python examples/make_icons.py --flat FLAT/package/icons.json --shaded NOTO/package/icons.json \
        --names calib_data/icons/names.txt --out icons.npz

Writes `rgba` uint8 [2 N, 64, 64, 4], and `caption` and `style` str [2 N]: N names in the style `flat` (Fluent Emoji,
MIT), then the same in the style `shaded` (Noto Emoji, Apache-2.0).
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import resvg_py
from make_calib_data import save_npz
from PIL import Image

SIDE = 64


def render(icons: dict, name: str) -> np.ndarray:
    """Render one icon of an IconifyJSON set as uint8 [SIDE, SIDE, 4], with straight alpha."""
    key = name.replace(" ", "-")
    key = icons.get("aliases", {}).get(key, {}).get("parent", key)
    icon = icons["icons"][key]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    size = f'width="{SIDE}" height="{SIDE}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="{box}">{icon["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Render the icons of the text-to-image teacher.")
    parser.add_argument("--flat", type=Path, required=True, help="icons.json of Fluent Emoji Flat")
    parser.add_argument("--shaded", type=Path, required=True, help="icons.json of Noto Emoji")
    parser.add_argument("--names", type=Path, required=True, help="the names, one per line")
    parser.add_argument("--out", type=Path, required=True, help="the npz file to write")
    args = parser.parse_args(argv)
    names = args.names.read_text(encoding="utf-8").splitlines()
    rgba, styles = [], []
    for style in ("flat", "shaded"):
        icons = json.loads(getattr(args, style).read_text(encoding="utf-8"))
        missing = [name for name in names if name.replace(" ", "-") not in {*icons["icons"], *icons.get("aliases", {})}]
        if missing:
            raise SystemExit(f"{getattr(args, style)}: has no icon '{missing[0]}' ({len(missing)} are missing)")
        rgba += [render(icons, name) for name in names]
        styles += [style] * len(names)
    save_npz(args.out, rgba=np.stack(rgba), caption=np.array(names * 2), style=np.array(styles))
    print(f"wrote {len(rgba)} icons to {args.out}")


if __name__ == "__main__":
    main()
