"""The GPU sources that moeshm compiles at run time, one file per job."""
