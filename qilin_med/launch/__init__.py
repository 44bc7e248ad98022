"""The processes of a stage: started by torch's elastic agent or any other launcher, on one node or many."""
