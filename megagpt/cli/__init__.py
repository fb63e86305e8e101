"""From what a user types and writes to a RunConfig, and back to YAML. No torch: it answers at once."""

from megagpt.cli.flags import parse_run_config
from megagpt.cli.yaml_file import read_config, to_yaml

__all__ = ["parse_run_config", "read_config", "to_yaml"]
