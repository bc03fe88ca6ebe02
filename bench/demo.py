"""`python -m t5fx.bench.demo`: the name that the README gives `demos.demo`."""

from .demos.demo import main

if __name__ == "__main__":
    main()
