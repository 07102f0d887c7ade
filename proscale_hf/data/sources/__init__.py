"""One file for each kind of data set, and what several of them read: large JSON, shapes of objects, files by name."""
