"""Move to another model: `python jobs/migrate.py --config configs/migrate.yaml --set migrate.move=true`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("migrate")
