"""Makes the tables of docs/configuration.md from the config's classes.

`PYTHONPATH=.:tests python -m support.config_page` rewrites the page.
"""

import json
import re
from pathlib import Path

from pydantic import TypeAdapter

from patch_based_ddpm.config import DiffusionConfig, ModelConfig, TrainerConfig
from patch_based_ddpm.strict_json import allowed
from patch_based_ddpm.studies.config import StudySection

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
SECTIONS = {"trainer": TrainerConfig, "model": ModelConfig, "diffusion": DiffusionConfig, "study": StudySection}


def table(name):
    """A Markdown table of a section's keys."""
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key, schema in TypeAdapter(SECTIONS[name]).json_schema()["properties"].items():
        default = f"`{json.dumps(schema['default'])}`" if "default" in schema else "required"
        lines.append(f"| `{name}.{key}` | {default} | {allowed(SECTIONS[name], key)} | {schema['description']} |")
    return "\n".join(lines)


def updated(page):
    """The page with each table between its two comments made anew."""
    tables = r"(<!-- keys of (\w+) -->\n).*?(\n<!-- end -->)"
    return re.sub(tables, lambda found: found[1] + table(found[2]) + found[3], page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
