"""`python -m attention_surgery.cli`, for `accelerate launch -m`."""

from .main import main

main()
