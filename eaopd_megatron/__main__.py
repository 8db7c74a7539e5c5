"""`python -m eaopd_megatron` is the command `eaopd`."""

from eaopd_megatron.cli import main

if __name__ == "__main__":
    main()
