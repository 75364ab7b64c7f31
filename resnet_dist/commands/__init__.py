"""The commands of `resnet-dist`, one module each. The command line imports the one it runs."""
