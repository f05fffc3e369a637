"""`python -m dina_lrm` is `dina-lrm`; `accelerate launch -m dina_lrm train ...` needs it."""

from dina_lrm.cli.main import run

if __name__ == "__main__":
    run()
