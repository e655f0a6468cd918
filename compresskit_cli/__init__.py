"""The command line of compresskit. Nothing here imports torch before a command needs it."""
