"""How fast this machine multiplies and copies at the moment: `python -m benchmarks.speed.rates` prints it as JSON."""

import json

from peftkit.planning.calibrate import measure

if __name__ == "__main__":
    print(json.dumps(measure()))
