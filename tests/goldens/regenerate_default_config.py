"""Writes the golden of the default configuration: every setting, one a line.

Run `python -m tests.goldens.regenerate_default_config` after adding, removing or changing a setting on purpose.
"""

from pathlib import Path

from Configuration_System import FullConfig
from tagger.config_io import flat_values

GOLDEN = Path(__file__).with_name("default_config.txt")


def render() -> str:
    return "".join(f"{key}={value!r}\n" for key, value in sorted(flat_values(FullConfig()).items()))


if __name__ == "__main__":
    GOLDEN.write_text(render(), encoding="utf-8")
