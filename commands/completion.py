"""`clawnet completion SHELL`: the script that teaches a shell to complete clawnet's commands."""

from __future__ import annotations

import os
from typing import Annotated, Any, NoReturn

import typer

from clawnet.errors import UsageError

from .invocation import NodeCommand, group
from .render import write

VARIABLE = "_CLAWNET_COMPLETE"
SHELLS = {"bash": "bash", "zsh": "zsh", "fish": "fish", "powershell": "powershell", "pwsh": "pwsh"}

app = group("Shell completion for bash, zsh, fish or PowerShell.")


@app.command("completion", cls=NodeCommand)
def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish|powershell", show_default=False)],
) -> None:
    """Print the completion script for a shell.

    bash: eval "$(clawnet completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc, after compinit; fish: clawnet
    completion fish > ~/.config/fish/completions/clawnet.fish; PowerShell: clawnet completion powershell | Out-String |
    Invoke-Expression in the profile.
    """
    if shell not in SHELLS:
        raise UsageError(f"there is no completion for {shell!r}", hint="bash, zsh, fish or powershell")
    script = _typer().get_completion_script(prog_name="clawnet", complete_var=VARIABLE, shell=SHELLS[shell])
    write(script.strip() + "\n")


def answer(command: Any) -> NoReturn:
    """What the script asks at every Tab: typer reads the words from the environment, prints what fits and exits."""
    _typer().completion_init()
    command.main(prog_name="clawnet", complete_var=VARIABLE)
    os._exit(1)


def _typer() -> Any:
    """typer's own completion; imported when asked for, as the hot path does without."""
    import typer.completion

    return typer.completion
