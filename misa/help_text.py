"""How the commands show their options."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Name each option once, say of a switch what it switches off, and no default where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            return f"do not {action.help}"
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        option = next(option for option in action.option_strings if option.startswith("--"))
        values = self._format_args(action, "VALUE")
        return f"{option} {values}" if values else option
