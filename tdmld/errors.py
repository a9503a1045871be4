"""What a person at the command line is told when something they asked for cannot be done.

    UserError          what happened, why, what to type next; an exit code of `tdmld.cli.exits`
    ├── ConfigError    configuration from flags, environment or tdmld.toml        (tdmld.config)
    └── KeyFileError   a key file is missing, readable by others, damaged or locked (tdmld.keys)

Catch UserError once, where the command ends. Packages have error trees of their own; whatever
crosses into a command is turned into a UserError there.
"""


class UserError(Exception):
    """An expected failure, told in three parts; `str()` gives them as lines."""

    def __init__(self, what: str, *, why: str = "", next: str = "", exit_code: int = 1) -> None:
        super().__init__(what, why, next)
        self.what = what
        self.why = why
        self.next = next
        self.exit_code = exit_code

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.next:
            lines.append(f"  next: {self.next}")
        return "\n".join(lines)
