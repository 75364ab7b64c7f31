"""The processes of a run: how they find each other, work together and notice a lost one."""
