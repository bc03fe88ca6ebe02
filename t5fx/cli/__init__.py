"""What the commands of `t5fx` have in common; each is a module in `commands`.

`t5fx_command` finds them there. The first line of a command's docstring is its line in the help; it
has `add_arguments(parser)` and `run(options)`, which returns what the command found (`running`).
"""
