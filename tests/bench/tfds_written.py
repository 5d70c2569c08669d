"""Files that TensorFlow Datasets 4.9.10 wrote, of four examples: image, file_name, label, and a sequence `objects`."""

from __future__ import annotations

import base64
import json
import lzma
from pathlib import Path

# One image a file, of number n: filled with 40 n, label n % 2, 3 n objects at (n, j, 8.25 + n + j) of size j % 2.
ORDER = (0, 3, 1, 2)
_SHARDS = {
    "tfrecord": """
/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4AQMAaxdAFcAMRkA+1CwdAVKvVc6thgdLwvE9/I9LOltU/wOnhY93vLCMf4IUQywNiQ+vkwuA4q5ggY5IE3+
fnmJUcp6MheOGGPyUiqMAo8UytOAEefMzmCy0ttMo9PHbhN6NkF40/lWPfmXxyX+n8zIjqq00E2XIg/dh7fx34b1WbOPD2zU8yUjFF9azJ3mpJ24MHdv
Va+E4HcoU1iUDb7b1t+UOmwhn8RPXxksKvK56Im6Pw8gVFq/U8IOP+jpF5XWOYhq8QQjKZV5T4dIAXCYI6u2bm0sqIPDZQsvWmBbHT1G1KItaGQoydpa
uffC+bDWZrGY1K/W66vPgCtGvIuotP8Qscds6v3a6h9srd592vn55a1dUnrZUW1qtmSPBSHjdKpwYroyFP5/fK0rwRL3Ts4YAX+pXQ14zXeYhHqC2GX+
b1ov7B6oyECXGSviysQAC2HZvdHa1gYKWuS9Pvn2gnh4NE6HOx0hucTQHC0Gu3Ja0LtDmzQFaL8REHfFs15DWxZhSUzC3hHtYLcqpRnqRACx5Daub7cm
ARLVajtrOo74q2YyQ9GysJHvhy9cR0YAAF43ffh+7IT0AAHIA40IAACKDW5oscRn+wIAAAAABFla
""",
    "array_record": """
/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4f//BXNdAEGryg0QbXfYd0lJbvtXUwedha3JZn+++gb6WmiQ5/ZRP5Tvqm8qC1w/8ZmHjqY717f1bqqa4q0S
9CiDdxz+Mub7g00iEtnFNtzmUlcvoGvb4jpEZil9s73jj/YjdwDqo/38KkiIWPl/1Oda1jYkIoJ7BzRHR/XGoniYYTEaX93M1Xp4EaizxIZQZEnRbruz
3FrbmD2fTO9ZIfxIUE0Ky/1olzCWsQH8fiJ0xVW4fEGoFtC0BtRIyk2H98Ev86DWgqVUHZ7pcgPXc0P8XqmUavV7yw/SPXzYQCGOYMa38TG/LyLjJX/V
K15+d4HCe/9mrxnHem2GuQk31dN4GijX/CG6+yEnTnImGg2M8Vmcm0Gdk253peEC+fwztO8wQ1KEWh3JYPyKlczYkxV+2ZxqKi8FODAe3AW95QLdh4+y
I8GqK6++n2fneOU/Da6S8yhDIGuBI/BmoI+Qr1DD3CtXcBHWq3kCkcEkgl24ruRNRVlq41xWzAh4IPklbq91Idy7PfskxrsncpynzXE8pIz9FUrTgQDa
yAzy0DOkCkiWGcjqXNNNXsn6EL4SpmqB1LrFGBfM6PfPrQ5/qKndNmD87J+6Kto2A2Ebj3hxfHSmbnEXj+nQqI0GcxuRfRsisskijVCRtsfGwQ6vH+Ms
FL/i8RAAoLwQEQjBUx2zQif538wNbJm6ud0wWeewl9RyErYKVSuCTF5sujgeywCSYZA35A9GYyFDz1+J/tNPjc5Jitbole1WEvCKmtP+aNw33cbzQKTl
URToGSdY0JjxKscY0Z6HYD4kA7g8lRrBtUBrX+T573kO7yuVA9vA+ADn1ep61O+d8vagjV1y67xYOpf9Q1YvKdMyoS9bQ3I0Rcq91DkMSvmvfCvrb5Pm
3H2pXEoZ62+Cxvss6Fxq1zUgpEdQkLsqYXTb1huTCNj5PPkzY790R9QbsPpWfjXPfcCI99oYkxPpZ2rBoBPIOB8hz7Pu+Sen8LIfyMa6+zl7dw/cSKfO
DlVsH64RtQ1aLVkTqLffIwnN7qn3W8NwFN6P5k4KhE7kWzKpjEANGHu8agaSurnZwf7aForUY4Yn5MNK5ocmjbbroH1z0SCwBj0uH6xNz9E8cTJfuiNn
AsRO6qepJVBXDPsTMTh2qvtJL6KEiLk04WSMcaWRWvUh3AgURMUjnxY4Wc+sZr18JGAWcdRcxpiOFkb+vvH/Ud8NU2NcDk1v/y9kGOu6mlXw4+rzxC1K
xksPKKU0m6s7k8SdiFa5EKSq7SIS0QoKzlV3rXt0atIWTW3kBCbg9wLXUELSlAe7w+DJmi+fAvfrUviqlPJyBFAPeEPqg+S5c6gW4b88zXH8NOClryei
U0G1q+xWjOvcDbwoXxN3YO98cb0nXvley8NHyLdJSZCXkY3aabuPJd6f4g4huocnx1ijx1TTmLRqcuyHrux5lYX3Zme7BzZADxV0l4sG4XOyDCrpIHh2
4ls63hFwENdpNMtltSmU3QGTEG4M3a2GxVEka07G8JODwRNBq4yzNLlfn2uFDjek6Av/3XBMuWfCXbSCOEsIQ+T6Y8+5/plA/hsO+LvhNYVOwP0t1uzZ
USUGDDiFZE7rF0gbbRB8FPFY98aWH5vRmtPt9Asxu9Ucb5IpmpMpi5XrxHh7iQHAOc6ubeulH5HZT0UlAT4sCRgH4DLcbHhEiyAIZTN4D2iQvU+qSgpp
0840MlqcUEprbQ+qo8peJfpWc+IKYImlSrGsySO3q1HyLcVPAOx171eQhjhahqU3O7ITQeMbDViAyVgVlbxGqSCwuBOGmNKBfjHPWx6AzBgTKzlLYdVV
dF3UwUcLQpsV9EcV5g9/Ey/+UIc+i7Ejxqxl2ziuIiXDAAAAC9z+GJebx7kAAY8LgIAIAHJk1p+xxGf7AgAAAAAEWVo=
""",
}


def write(root: Path, form: str) -> Path:
    """The data set "clevr" 3.1.0 below `root`, in one shard of a format; returns its folder."""
    folder = root / "clevr" / "3.1.0"
    folder.mkdir(parents=True)
    (folder / f"clevr-train.{form}-00000-of-00001").write_bytes(lzma.decompress(base64.b64decode(_SHARDS[form])))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"filepathTemplate": template, "name": "train", "numBytes": "973", "shardLengths": ["4"]}
    info = {"fileFormat": form, "moduleName": "__main__", "name": "clevr", "splits": [split], "version": "3.1.0"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "label.labels.txt").write_text("ape\nbee\n")
    (folder / "objects-size.labels.txt").write_text("small\nlarge\n")
    return folder
