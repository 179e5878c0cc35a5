use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn code(k: u8, m: u8) -> ReedSolomon {
    ReedSolomon::new(Geometry { k, m }).unwrap()
}

fn block(seed: u64) -> Option<Block> {
    let bytes: Vec<u8> = (0..BLOCK as u64).map(|i| gabion_proto::placement::mix(seed ^ i) as u8).collect();
    Block::of(bytes.into())
}

fn data(k: u8, rows: u32, seed: u64) -> BTreeMap<u8, Rows> {
    let at = |n: u8, r: u32| {
        let seed = seed ^ u64::from(n) << 40 ^ u64::from(r) << 20;
        if seed.is_multiple_of(3) { None } else { block(seed) }
    };
    (0..k).map(|n| (n, (0..rows).map(|r| at(n, r)).collect())).collect()
}

/// Multiplication in GF(2^8), bit by bit.
fn times(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = a << 1 ^ if a & 0x80 != 0 { 0x1d } else { 0 };
        b >>= 1;
    }
    product
}

fn power(a: u8, n: u8) -> u8 {
    (0..n).fold(1, |p, _| times(p, a))
}

/// The systematic matrix by Gauss-Jordan on the columns of a Vandermonde matrix.
fn matrix(k: usize, m: usize) -> Vec<Vec<u8>> {
    let mut rows: Vec<Vec<u8>> =
        (0..k + m).map(|r| (0..k).map(|c| power(r as u8, c as u8)).collect()).collect();
    for i in 0..k {
        let pivot = (i..k).find(|c| rows[i][*c] != 0).unwrap();
        rows.iter_mut().for_each(|r| r.swap(i, pivot));
        let inverse = (1..=255u8).find(|x| times(*x, rows[i][i]) == 1).unwrap();
        rows.iter_mut().for_each(|r| r[i] = times(r[i], inverse));
        for c in (0..k).filter(|c| *c != i) {
            let factor = rows[i][c];
            rows.iter_mut().for_each(|r| r[c] ^= times(r[i], factor));
        }
    }
    rows
}

/// What is on disks must stay readable: the matrix is fixed, whatever library computes with it.
#[test]
fn parity_is_what_the_written_down_matrix_says() {
    for (k, m) in [(2, 1), (3, 2), (4, 2), (8, 3), (12, 4)] {
        let data = data(k, 2, 77);
        let wanted: Vec<u8> = (k..k + m).collect();
        let parity = code(k, m).compute(&data, &wanted).unwrap();
        let matrix = matrix(k.into(), m.into());
        for n in &wanted {
            for row in 0..2 {
                let at = |rows: &Rows, i: usize| rows[row].as_ref().map_or(0, |b| b.bytes[i]);
                for i in [0, 1, 255, 4095] {
                    let sum = (0..k)
                        .fold(0, |s, c| s ^ times(matrix[usize::from(*n)][usize::from(c)], at(&data[&c], i)));
                    assert_eq!(at(&parity[n], i), sum, "{k}+{m}, shard {n}, row {row}, byte {i}");
                }
            }
        }
    }
}

#[test]
fn blocks_lie_where_the_page_says() {
    let g = Geometry { k: 3, m: 2 };
    for b in 0..100 {
        let (shard, row) = g.place(b);
        assert_eq!((g.block(shard, row), shard < 3), (b, true));
    }
    assert_eq!((g.rows(0, 1), g.rows(2, 2), g.rows(5, 7), g.all_rows(256)), ((0, 1), (0, 2), (1, 3), 86));
}

#[test]
fn too_few_or_uneven_shards_are_refused() {
    let mut d = data(4, 3, 5);
    assert!(code(4, 2).compute(&d, &[4]).is_ok());
    d.get_mut(&2).unwrap().pop();
    assert_eq!(code(4, 2).compute(&d, &[4]), Err(CodeError::TooFew { have: 4, need: 4 }));
    d.remove(&2);
    assert_eq!(code(4, 2).compute(&d, &[2]), Err(CodeError::TooFew { have: 3, need: 4 }));
    assert!(ReedSolomon::new(Geometry { k: 0, m: 2 }).is_err());
}

/// Some data blocks of some rows change: what is added to the old parity gives the parity of the new rows, whatever the code, and is
/// what the written down matrix says.
#[test]
fn what_is_added_to_parity_gives_the_parity_of_the_new_rows() {
    for (k, m) in (2..=12).flat_map(|k| (1..=4).map(move |m| (k, m))) {
        let code = code(k, m);
        let parity: Vec<u8> = (k..k + m).collect();
        for round in 0..3 {
            let seed = u64::from(k) << 16 | u64::from(m) << 8 | round;
            let chance = |n: u8, r: u32, what: u64| {
                gabion_proto::placement::mix(seed ^ what << 56 ^ u64::from(n) << 32 ^ u64::from(r)) % 4
            };
            let old = data(k, 4, seed);
            let new: BTreeMap<u8, Rows> = old
                .iter()
                .map(|(n, rows)| {
                    let changed = |(r, old): (u32, &Option<Block>)| match chance(*n, r, 1) {
                        0 => block(seed ^ 0xabcd ^ u64::from(*n) << 48 ^ u64::from(r)),
                        1 if chance(*n, r, 2) == 0 => None,
                        _ => old.clone(),
                    };
                    (*n, (0..).zip(rows).map(changed).collect())
                })
                .collect();
            // Shards of which nothing changes need not be named.
            let changes: BTreeMap<u8, Rows> = (0..k)
                .filter(|n| old[n] != new[n] || *n == 1)
                .map(|n| (n, old[&n].iter().zip(&new[&n]).map(|(a, b)| Block::sum(a, b)).collect()))
                .collect();
            let added = code.added(&changes).unwrap();
            let (before, after) =
                (code.compute(&old, &parity).unwrap(), code.compute(&new, &parity).unwrap());
            let matrix = matrix(k.into(), m.into());
            for n in &parity {
                let sums: Rows = before[n].iter().zip(&added[n]).map(|(a, b)| Block::sum(a, b)).collect();
                assert_eq!(sums, after[n], "{k}+{m}, shard {n}");
                let at = |b: &Option<Block>| b.as_ref().map_or(0, |b| b.bytes[1234]);
                for row in 0..4 {
                    let sum = changes.iter().fold(0, |s, (c, rows)| {
                        s ^ times(matrix[usize::from(*n)][usize::from(*c)], at(&rows[row]))
                    });
                    assert_eq!(at(&added[n][row]), sum, "{k}+{m}, shard {n}, row {row}");
                }
            }
        }
    }
}

#[test]
fn changes_that_are_not_of_data_are_refused() {
    let mut changes = data(4, 3, 5);
    assert!(code(4, 2).added(&changes).is_ok());
    changes.get_mut(&2).unwrap().pop();
    assert_eq!(code(4, 2).added(&changes), Err(CodeError::Uneven));
    assert_eq!(code(4, 2).added(&BTreeMap::from([(4, vec![None])])), Err(CodeError::Uneven));
    let nothing = code(4, 2).added(&BTreeMap::from([(3, vec![None])])).unwrap();
    assert_eq!(nothing, BTreeMap::from([(4, vec![None]), (5, vec![None])]));
    assert_eq!(code(4, 2).added(&BTreeMap::new()).unwrap(), BTreeMap::from([(4, vec![]), (5, vec![])]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any k shards give every other one back, zeros included.
    #[test]
    fn any_k_shards_give_all_the_others(k in 1u8..9, m in 1u8..5, rows in 1u32..4, seed: u64, order: u64) {
        let code = code(k, m);
        let mut all = data(k, rows, seed);
        all.extend(code.compute(&all, &(k..k + m).collect::<Vec<_>>()).unwrap());
        let mut numbers: Vec<u8> = (0..k + m).collect();
        numbers.sort_by_key(|n| gabion_proto::placement::mix(order ^ u64::from(*n)));
        let (kept, lost) = numbers.split_at(k.into());
        let have = kept.iter().map(|n| (*n, all[n].clone())).collect();
        let back = code.compute(&have, lost).unwrap();
        for n in lost {
            prop_assert_eq!(&back[n], &all[n]);
        }
    }

    /// What a store returns and what goes into one are the same rows.
    #[test]
    fn content_and_rows_are_each_other(first in 0u32..100, pattern: u64) {
        let rows: Rows = (0..24).map(|i| if pattern >> i & 1 == 1 { block(i) } else { None }).collect();
        for content in [
            content_of((first..).zip(rows.iter().cloned())),
            sparse_content((first..).zip(rows.iter().cloned())),
        ] {
            content.validate(true).unwrap();
            prop_assert_eq!(&rows_of(&content, first, 24), &rows);
        }
    }
}
