"""The training loop and its parts; `fastpeft.train` is the command that runs it."""
