"""`python -m bge_ray`, which is `bge-ray`."""

from bge_ray.command import main

if __name__ == "__main__":
    main()
