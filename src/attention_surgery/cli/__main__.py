"""`python -m attention_surgery.cli`, for `accelerate launch -m`."""

from .main import main

if __name__ == "__main__":  # processes that are spawned import this file again
    main()
