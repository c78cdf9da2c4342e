"""16-bit weights into the order in which kernels fetch them, without the GIL."""

from libc.stdint cimport uint16_t
from libc.string cimport memcpy

cdef enum:
    # Of a tile, both ways; of a block, rows; of what stays together, values.
    TILE = 64
    BLOCK_ROWS = 8
    EIGHT = 8
    # Eights in a row of a block.
    PLACES = 4
    BLOCK_COLUMNS = PLACES * EIGHT


def fill_tiles(uint16_t[::1] target not None, const uint16_t[:, ::1] rows not None):
    """Write a matrix, of multiples of 64 rows and columns, as tiles of 64 x 64 values, one behind
    the other along its rows.

    A tile is 8 x 2 blocks of 8 x 32 values. A row r of a block is four eights, of which the one at
    place p is the matrix's number p ^ r / 2: so fetches of a block's columns meet in no bank of
    shared memory (kernels/ffn.cuh, IS_TILED). ValueError: the sizes.
    """
    cdef Py_ssize_t n_rows = rows.shape[0], n_columns = rows.shape[1]
    if n_rows % TILE or n_columns % TILE or target.shape[0] != n_rows * n_columns:
        raise ValueError(f"{n_rows} x {n_columns} values into {target.shape[0]}; tiles are of "
                         "64 x 64, and the target is as large as the matrix")
    if not n_rows * n_columns:
        return
    cdef uint16_t *to = &target[0]
    cdef const uint16_t *source = &rows[0, 0]
    cdef Py_ssize_t row, column
    with nogil:
        for row in range(n_rows // TILE):
            for column in range(n_columns // TILE):
                _fill_tile(to, source + TILE * (row * n_columns + column), n_columns)
                to += TILE * TILE


cdef void _fill_tile(uint16_t *to, const uint16_t *tile, Py_ssize_t n_columns) noexcept nogil:
    cdef const uint16_t *line
    cdef int block_row, block_column, row, place
    for block_row in range(TILE // BLOCK_ROWS):
        for block_column in range(TILE // BLOCK_COLUMNS):
            for row in range(BLOCK_ROWS):
                line = tile + (block_row * BLOCK_ROWS + row) * n_columns
                line += block_column * BLOCK_COLUMNS
                for place in range(PLACES):
                    memcpy(to, line + (place ^ row // 2) * EIGHT, EIGHT * sizeof(uint16_t))
                    to += EIGHT
